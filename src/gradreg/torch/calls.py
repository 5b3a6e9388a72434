"""What a call of ``backward`` may ask for: which closures, ranks, scales and held-out data go with which penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from gradreg import checks
from gradreg.held_out import HeldOut
from gradreg.penalties import GradientPenalty
from gradreg.plan import Plan
from gradreg.torch.closures import Scaler
from gradreg.torch.parallel import Parallelism

Scope = Literal["local", "global"]
Perturb = Literal["all", "each"]


def check_each(perturb: Perturb, penalty: GradientPenalty | None, scope: Scope, *, has_ascent: bool) -> None:
    """Raise if the closures cannot each have a perturbation of their own."""
    checks.choice("perturb", perturb, ("all", "each"))
    if has_ascent:
        raise ValueError("perturb must be 'all' with ascent, whose closures belong to no micro-batch; got 'each'. Leave one of them out.")
    if scope == "global":
        raise ValueError(
            "perturb must be 'all' with scope='global', which perturbs all ranks and micro-batches alike; got 'each'. Build the "
            "regularizer with scope='local'."
        )
    if penalty is not None:
        penalty.check_each()


def check_given(held_out: object, penalty: GradientPenalty | None, rule: HeldOut) -> None:
    """Raise if held-out closures are missing without which the penalty would never begin, or its radius stay as it is."""
    if held_out is not None or penalty is None:
        return
    learned = penalty.learned_radius
    if learned is not None:
        waiting = f"{learned}, a radius that is learned from held-out data"
    elif rule.waiting is not None:
        waiting = "HeldOut(steps_per_epoch=...), whose penalty waits for what held-out data say"
    else:
        return
    raise ValueError(f"held_out must be given with {waiting}; got none. Pass backward(..., held_out=closure), at every step.")


def check_held_out(plan: Plan, penalty: GradientPenalty | None, parallelism: Parallelism) -> None:
    """Raise if the correction that the penalty makes to the plain gradient cannot be measured."""
    if not plan.has_plain_pass:
        raise ValueError(
            "held_out must be left out where no pass gives the plain gradient, to which the regularized one is compared; got it with "
            f"{penalty}. Use sam(), fgr() or gnp() without ascent."
        )
    parallelism.check_averaging("held_out must be left out", "held-out closures", "leave held_out out")


def check_averaging(plan: Plan, penalty: GradientPenalty | None, scope: Scope, parallelism: Parallelism) -> None:
    """Raise if the step needs gradients averaged over the ranks and the caller has switched that off."""
    remedy = "build the regularizer with scope='local'"
    if scope == "global" and not plan.is_one_plain_pass:
        parallelism.check_averaging("scope must be 'local'", "'global'", remedy)
    if penalty is not None and (penalty.has_memory or penalty.keeps_plain_apart):
        rule = "penalty must neither remember gradients nor mix them otherwise than by a sum"
        parallelism.check_averaging(rule, str(penalty), "use another penalty")


def checked_backward(
    backward: Callable[[Tensor], object] | None, scaler: Scaler | None, penalty: GradientPenalty | None, *, first: bool
) -> Callable[[Tensor], object] | None:
    """``backward``; in the ``first`` step raising if it holds a loss scale that would enter the perturbation unnoticed."""
    if backward is not None and not callable(backward):
        raise TypeError(f"backward must be callable; got {checks.describe(backward)}. Pass accelerator.backward, say.")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler must have a method scale(tensor); got {checks.describe(scaler)}. Pass the torch.amp.GradScaler in use.")
    unnoticed = first and scaler is None and penalty is not None and not _is_scale_free(penalty)
    return _refuse_scaling(backward) if backward is not None and unnoticed else backward


def _is_scale_free(penalty: GradientPenalty) -> bool:
    """Whether an unknown factor on all gradients of a step only multiplies its result."""
    return penalty.power == 1 and not penalty.has_memory and not penalty.decoupled


def _refuse_scaling(backward: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """``backward``, raising if it multiplies the loss by more than 1."""

    def checked(loss: Tensor) -> None:
        received: list[Tensor] = []
        handle = loss.register_hook(received.append)
        backward(loss)
        handle.remove()
        if received and abs(float(received[0])) > 1.0:
            raise ValueError(
                f"backward must not scale the loss unless scaler is given; got one that multiplies it by {float(received[0]):g}, and a "
                "penalty on the squared norm would be off by that factor. Pass scaler=accelerator.scaler (or the GradScaler in use); "
                "a factor of the objective belongs in the closure."
            )

    return checked
