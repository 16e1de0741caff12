"""Whether the backends are right on this machine: `python -m kernels.check`.

    cases           what each operation is tried on
    comparison      a backend beside the definition, values and gradients
    conformance     every backend in every way there is here
    machine_code    what a Triton kernel needs of a GPU that need not be here
    targets         accelerators that need not be here, and their compilers
    ahead           every operation compiled for one
    compiled        the tables of that
    certificate     the file that says what was found, and for what it holds

Nothing is imported here: whoever reads a certificate compiles nothing.
"""
