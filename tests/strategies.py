"""What hypothesis draws: schedules and penalties of every kind, over the values that a user could mean."""

from hypothesis import strategies as st

import gradreg
from gradreg import Chance, Constant, Cosine, Delay, Every, GradientPenalty, LogTime, Product, Ramp, Schedule

steps = st.integers(1, 1000)
numbers = st.floats(-10, 10)
positive = st.floats(1e-3, 10)


def schedules(values: st.SearchStrategy[float] = numbers) -> st.SearchStrategy[Schedule]:
    """Any schedule whose numbers are ``values``, nested to a few levels."""
    flat = st.one_of(
        st.builds(Constant, value=values),
        st.builds(Ramp, start=values, end=values, steps=steps),
        st.builds(Cosine, start=values, end=values, steps=steps),
        st.builds(LogTime, value=values, t0=steps),
        st.builds(Every, k=steps, value=positive),
        st.builds(Chance, p=st.floats(0.01, 1), seed=st.integers(0, 2**32 - 1), value=positive),
    )
    return st.recursive(
        flat,
        lambda inner: st.one_of(
            st.builds(Delay, value=st.one_of(values, inner), steps=steps),
            st.builds(Product, left=st.one_of(values, inner), right=inner),
        ),
        max_leaves=4,
    )


values_above_zero = st.one_of(positive, schedules(positive))

plain_penalties: st.SearchStrategy[GradientPenalty] = st.one_of(
    st.builds(gradreg.sam, rho=values_above_zero),
    st.builds(gradreg.gnp, r=values_above_zero, alpha=st.floats(0, 2), mixing=st.sampled_from(["plain", "unit"])),
    st.builds(gradreg.fgr, gamma=values_above_zero, epsilon=values_above_zero),
    st.builds(gradreg.bgr, gamma=values_above_zero, epsilon=positive),
    st.builds(gradreg.cgr, gamma=positive, epsilon=values_above_zero),
    st.builds(gradreg.exact, gamma=values_above_zero, power=st.sampled_from([1, 2])),
)
penalties: st.SearchStrategy[GradientPenalty] = st.one_of(
    plain_penalties,
    st.builds(lambda p, kind, n: p.warmup(kind, steps=n), plain_penalties, st.sampled_from(["zero", "strength"]), steps),
)
