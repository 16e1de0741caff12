"""What a model, a loss and a report have to know of a dataset."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the data say of themselves.

    Attributes:
        encoder: that reads the inputs, a key of `layers.models.model.ENCODERS`, or
            "video".
        length: tokens of an example, or frames.
        outputs: width of the model's output: classes, vocabulary, regression targets or
            channels.
        loss: a key of `train.losses.LOSSES`, which is the kind of the task.
        channels: of a token, pixel or frame.
        vocab_size: tokens or codes that there are; 0 for numbers.
        padded: whether examples have masked tokens.
        causal: whether later inputs hold the targets.
        size: (h, w) of images and frames.
        actions: what accompanies a frame: numbers, 0 for nothing.
        codec: the workdir of the autoencoder that made the codes, or "".
        symbols: what each token stands for, if it has a name.
        start: the token that begins a sequence which is made up.
        classes: names of the classes, in the order of their numbers; () where they have
            none.
        mean, std: of each channel of the inputs, which were subtracted and divided by;
            () where inputs are as they came.
        rate: samples per second of recordings; 0 for other inputs, and in what was kept
            before there was this field.
    """

    encoder: str
    length: int
    outputs: int
    loss: str
    channels: int = 1
    vocab_size: int = 0
    padded: bool = False
    causal: bool = False
    size: tuple[int, ...] = ()
    actions: int = 0
    codec: str = ""
    symbols: tuple[str, ...] = ()
    start: int = 0
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rate: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of what the model answers with: of its classes, or of the tokens that it
        predicts; () where the data name neither."""
        return self.classes or (self.symbols if self.loss == "token" else ())

    def name(self, number: int) -> str:
        """The number's name; the number itself where it has none."""
        return self.names[number] if number < len(self.names) else str(number)

    def but(self, **changes) -> "Spec":
        """The same with other values."""
        return dataclasses.replace(self, **changes)
