"""Flags for the fields of a layer of the user's own, as LAYER_ARGS has them for others.

python -m train.main --config pixels:digits,layer=my.Layer --config.model.layer_args.n=3
"""

import re
import sys

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

FLAG = re.compile(r"--?(no)?config\.model\.layer_args\.")


class OwnFields(flags.ArgumentParser):
    """Reads the config file like `file`; where a flag sets fields of layers, the config
    gets those of layers that are not of this project, with their defaults."""

    def __init__(self, file: flags.ArgumentParser):
        self.file = file
        self.added = {}  # path in the config -> the mapping that has it

    def parse(self, argument):
        config, self.added = self.file.parse(argument), {}
        if any(map(FLAG.match, sys.argv)):
            with config.unlocked():
                self._add(config.model)
        return config

    def flag_type(self):
        return self.file.flag_type()

    def _add(self, model):
        # Here and not above: most mistyped flags are answered before JAX has started.
        from layers import contract
        from layers.models import build

        for name in build.foreign(model):
            args, path = model.layer_args, "model.layer_args"
            if not isinstance(model.layer, str):  # a pattern
                key = build.args_key(name)
                path = f"{path}.{key}"
                if key not in args:
                    args[key] = ConfigDict()
                args = args[key]
            for field, (kind, default) in contract.settable(build.get(name)).items():
                if field not in args:
                    args[field] = placeholder(kind) if default is None else default
                    self.added[f"{path}.{field}"] = args

    def drop_unset(self, given):
        """Leaves to the classes what no flag of `given` has set, as without any."""
        for path, args in self.added.items():
            if path not in given:
                with args.unlocked():
                    del args[path.rpartition(".")[2]]
