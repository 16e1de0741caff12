"""For the forms that take everything in one dtype and know no skip."""


def in_state_dtype(form):
    """`form(u, dt, A, B, C, state, into)` in the dtype of the state, as a module's
    `selective_scan(u, dt, A, B, C, skip, state, into)`, which takes each array in its
    own dtype and gives y in u's."""

    def selective_scan(u, dt, A, B, C, skip, state, into):
        wide, dt, A, B, C = (x.astype(state.dtype) for x in (u, dt, A, B, C))
        y, final = form(wide, dt, A, B, C, state, into)
        if skip is not None:
            y = y + skip.astype(state.dtype) * wide
        return y.astype(u.dtype), final

    selective_scan.__doc__ = form.__doc__
    return selective_scan
