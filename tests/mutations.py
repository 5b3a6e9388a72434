"""Break the PyTorch engine, or the training system, in one place at a time, and see which tests notice.

    python tests/mutations.py            # every mutant, with the tests that fail
    python tests/mutations.py sign norm  # those whose name contains one of the words
    python tests/mutations.py --first    # stop each at the first test that fails: quicker, and enough to see that it does not survive

Each mutant is one replaced text in a temporary copy of ``src``; the tests of ``tests/torch`` that need one process run against that copy, and against mutants of
the training system ("train: ...") the tests that each names. The status is 1 if a mutant survives, or if its text is no longer in the source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: E501

ROOT = Path(__file__).resolve().parents[1]
ENGINE = (
    "torch",
    "--ignore=tests/torch/test_auto_radius_parallel.py",
    "--ignore=tests/torch/test_data_parallel.py",
    "--ignore=tests/torch/test_data_parallel_inside.py",
    "--ignore=tests/torch/test_fsdp.py",
)
"""The tests of the engine that need one process."""
EACH = ("torch/test_microbatches.py",)
TAIL = ("test_tail.py",)
HELD_OUT = ("test_held_out.py", "torch/test_held_out.py")
AUTO_RADIUS = ("test_auto_radius.py", "torch/test_auto_radius.py", "torch/test_auto_radius_guards.py")
FAMILY = ("torch/test_family.py", "-m", "not slow")
ADAPTED = ("torch/test_adapted.py",)
TIMM = ("integrations/test_timm.py",)
BI_LORA = ("integrations/test_bi_lora.py",)
LIKELY = {
    "../penalties.py": ("closures", "cost", "family"),
    "../plan.py": ("identities", "family"),
    "../registry.py": ("unknown_parts",),
    "../auto_radius.py": ("auto_radius",),
    "auto_radius.py": ("auto_radius",),
    "buffers.py": ("same_function", "forward_state", "batch_statistics"),
    "closures.py": ("same_function", "forward_state", "aux", "random_numbers", "where_things_are"),
    "decoupled.py": ("family",),
    "directions.py": ("identities", "family", "precision"),
    "draws.py": ("draws",),
    "exact.py": ("where_things_are", "quadratics", "closures"),
    "gradients.py": ("gradients", "restore"),
    "masks.py": ("masks", "family"),
    "mixing.py": ("identities", "family"),
    "norms.py": ("small_numbers", "gradients", "dispatch"),
    "parallel.py": ("same_function", "where_things_are"),
    "perturbation.py": ("quadratics", "restore", "interrupts", "identities", "small_numbers"),
    "regularizer.py": ("auto_radius", "aux", "bad_input", "gradients", "metrics", "family", "cost"),
    "rng.py": ("same_function", "random_numbers"),
    "state.py": ("remembering", "family", "precision", "resume"),
    "step.py": ("auto_radius", "identities", "family", "unreached", "metrics", "precision", "remembering", "gradients", "memory"),
    "watch.py": ("where_things_are",),
}
"""The tests of the engine that come first with ``--first``, by the file that is broken."""


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``src/gradreg/torch/<file>``, and ``tests``, paths under ``tests`` and options of pytest, should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ENGINE


MUTANTS = (
    Mutant('sign of the perturbation reversed', 'step.py', 'distance = ascent.distance(self.penalty.power, by * self.values.radius)', 'distance = ascent.distance(self.penalty.power, -by * self.values.radius)'),
    Mutant('perturbation removed', 'step.py', 'distance = ascent.distance(self.penalty.power, by * self.values.radius)', 'distance = ascent.distance(self.penalty.power, 0.0)'),
    Mutant('normalization dropped', 'directions.py', 'return safe_ratio(signed, norm) if isinstance(norm, Tensor) else signed / norm', 'return signed'),
    Mutant("sign of a negative weight forgotten", "directions.py", "1.0 if self.weight > 0 else -1.0", "1.0"),
    Mutant("weight of the first pass forgotten in the step", "directions.py", "return radius * self.factor / self.weight / self.scale", "return radius * self.factor / self.scale"),
    Mutant('(1 - c) forgotten', '../plan.py', 'return 1.0 - c, ((+1, c),)', 'return 1.0, ((+1, c),)'),
    Mutant("backward difference with the forward's weight", '../plan.py', 'return 1.0 + c, ((-1, -c),)', 'return 1.0 - c, ((-1, c),)'),
    Mutant("central difference not halved", "../plan.py", "((+1, c / 2), (-1, -c / 2))", "((+1, c), (-1, -c))"),
    Mutant('mirror at the wrong place', 'perturbation.py', 'torch._foreach_lerp_(record.shards, record.copies, 2.0)', 'torch._foreach_lerp_(record.shards, record.copies, 1.0)'),
    Mutant('restore by subtraction', 'perturbation.py', '            torch._foreach_copy_(record.shards, record.copies)\n        if self._noise is not None:\n            self._noise.end()\n        self._drop_copies()', '            torch._foreach_sub_(record.shards, [p - c for p, c in zip(record.shards, record.copies, strict=True)])\n        if self._noise is not None:\n            self._noise.end()\n        self._drop_copies()'),
    Mutant('no restore after an exception', 'perturbation.py', '            try:\n                yield\n            finally:\n                self.restore()\n        except BaseException:\n            self.restore()  # again, because an interrupt may have come during the first time\n            raise', '            yield\n            self.restore()\n        except BaseException:\n            self._swapped, self._copied = [], []\n            raise'),
    Mutant('gradients not put back after an exception', 'gradients.py', '            self.restore(stash)\n            raise', '            raise'),
    Mutant('RNG not replayed', 'buffers.py', '            self._random.restore(states)', '            pass'),
    Mutant('RNG captured once for all micro-batches', 'closures.py', 'self._go_to(group.starts[i])', 'self._go_to(group.starts[0])'),
    Mutant('BatchNorm not frozen', 'closures.py', '        if group.end is not None:\n            self._go_to(group.end)', '        if False:\n            self._go_to(group.end)'),
    Mutant('buffers told by the version counter alone', 'buffers.py', 'return slot.address in start.contents and not _same(*start.contents[slot.address])', 'return False'),
    Mutant('replaced buffers missed', 'buffers.py', '        elif self.fixed is None:\n            self.holder[self.key] = value', '        elif False:\n            self.holder[self.key] = value'),
    Mutant('earlier gradients enter the norm', 'gradients.py', '        self.clear()\n        return stash', '        return stash'),
    Mutant('earlier gradients lost', 'step.py', '                        self.gradients.add(earlier)', '                        pass'),
    Mutant('zero gradient divided by', 'norms.py', '        return 0.0 if read <= (1e-36 if norm.dtype == torch.float32 else _underflowing(norm.dtype)) else numerator / read', '        return numerator / norm'),
    Mutant('selection ignored', 'regularizer.py', '        perturbed = [p for p in self._perturbed if p.requires_grad]', '        perturbed = trainable'),
    Mutant('unit mixing not normalised', 'mixing.py', 'return ratio_or_zero(weight, norm)', 'return weight'),
    Mutant('no warm-up clock', 'regularizer.py', '        self._step = number + 1\n', ''),
    Mutant('two passes at strength 0', '../penalties.py', '        if values.acts is False:\n            return plan.PLAIN\n', ''),
    Mutant('loss of the last pass returned', 'closures.py', 'wanted = self._first_values is None', 'wanted = True'),
    Mutant('first gradient held beside the second', 'step.py', '        if this.keeps != "sum":\n            gradients.clear()', '        if this.keeps != "sum":\n            pass'),
    Mutant("norm waited for", "norms.py", "    return norms[0] if len(norms) == 1 else _norm_of(norms)", "    return norms[0] if float(norms[0]) and len(norms) == 1 else _norm_of(norms)"),
    Mutant("exact strength not divided by the norm", "exact.py", "factor = strength if penalty.power == 2 else safe_ratio(strength, norm)", "factor = strength"),
    Mutant("exact direction of each micro-batch alone", "exact.py", "held = direction if direction is not None else", "held ="),
    Mutant('family: T dropped from the move', 'directions.py', '    norm = norm_of_shards(vectors, inputs.parameters)  # of T·g, before the second factor T\n    torch._foreach_mul_(products, scales)\n', '    norm = norm_of_shards(vectors, inputs.parameters)  # of T·g, before the second factor T\n'),
    Mutant('family: T dropped from the norm', 'directions.py', '    norm = norm_of_shards(vectors, inputs.parameters)  # of T·g, before the second factor T\n', '    norm = inputs.norm()\n'),
    Mutant('family: weight of the pass not in the average', 'step.py', 'self.step.unscaling(this.weight, shards)', 'self.step.unscaling(1.0, shards)'),
    Mutant('family: decay the wrong way round in a pass', 'state.py', 'torch._foreach_lerp(remembered, _comparable(gradients, remembered, factor), 1.0 - decay)', 'torch._foreach_lerp(remembered, _comparable(gradients, remembered, factor), decay)'),
    Mutant('family: decay the wrong way round after the passes', 'state.py', 'torch._foreach_lerp_(remembered, _comparable(gradients, remembered, factor), 1.0 - decay)', 'torch._foreach_lerp_(remembered, _comparable(gradients, remembered, factor), decay)'),
    Mutant('family: factor of the gradients not taken off', 'state.py', 'return wide if isinstance(factor, float) and factor == 1.0 else', 'return wide if True else'),
    Mutant('family: memory not updated', 'state.py', '                self._keep(new)\n', ''),
    Mutant('family: overflow remembered', 'state.py', '(not finite_only or _finite(new.evidence, new.parameters))', 'True'),
    Mutant('family: overflow remembered after the passes', 'state.py', '(finite_only and not _finite(gradients, parameters))', 'False'),
    Mutant('family: loss scale remembered', 'step.py', '1.0 / (weight * self.evaluator.scale(shards[0]))', '1.0 / weight'),
    Mutant('family: gradients overwritten that a mask looks at', 'step.py', 'this.keeps == "nothing" and not (step.mask is not None and step.mask.needs_gradients(self.values.step))', 'this.keeps == "nothing"'),
    Mutant('family: gradients overwritten that are accumulated', 'step.py', 'consumable=this.keeps == "nothing" and ', 'consumable='),
    Mutant('norm measured without being asked for', 'step.py', 'self.measure_norm and all(', 'all('),
    Mutant("family: T for biases too", "directions.py", "if p.dim() > 1 or direction.one_dimensional", "if p.dim() > 0"),
    Mutant("family: eta dropped", "directions.py", "        torch._foreach_add_(scales, direction.eta)", "        pass"),
    Mutant('family: no cap on a loss-equated step', 'directions.py', '        limited = min(inverse, float(cap))', '        limited = inverse', FAMILY),
    Mutant('family: a loss-equated step by the norm once', 'directions.py', 'factor=inverse * limited)', 'factor=limited)', FAMILY),
    Mutant('family: lambda the wrong way round', 'directions.py', 'factor=(1.0 - lam) + lam * inputs.inverse_norm())', 'factor=lam + (1.0 - lam) * inputs.inverse_norm())', FAMILY),
    Mutant('family: t counted from 0', '../directions.py', 'first = 1.0 / ((step + 1) / 1)', 'first = 1.0 / (max(step, 1) / 1)', FAMILY),
    Mutant('family: fans the wrong way round', '../directions.py', 'return math.sqrt(fan_out / fan_in)', 'return math.sqrt(fan_in / fan_out)', FAMILY),
    Mutant('family: a table counted as a matrix', 'directions.py', 'looked_up=p in tables)', 'looked_up=False)', FAMILY),
    Mutant('family: a transposed convolution as any', 'directions.py', 'if p in transposed and direction.layout is None:', 'if False:', FAMILY),
    Mutant('family: the factor of a length of its own forgotten', 'directions.py', 'return radius * self.factor / self.weight / self.scale', 'return radius / self.weight / self.scale', FAMILY),
    Mutant('family: loss scale in the inverse norm', 'directions.py', 'safe_ratio(abs(self.weight) * self.scale, self.norm())', 'safe_ratio(abs(self.weight), self.norm())', ("torch/test_identities.py", "torch/test_precision.py")),
    Mutant('family: weight in the inverse norm', 'directions.py', 'safe_ratio(abs(self.weight) * self.scale, self.norm())', 'safe_ratio(self.scale, self.norm())', ("torch/test_identities.py", "torch/test_precision.py")),
    Mutant('shares of the last perturbation', 'step.py', 'if step.measure_shares and not self._lengths:', 'if step.measure_shares:', ("torch/test_metrics.py",)),
    Mutant('shares without the square', 'metrics.py', '(lengths / lengths.max()).square()', '(lengths / lengths.max())', ("torch/test_metrics.py",)),
    Mutant('family: average added, not taken away', 'directions.py', '-direction.sigma * inputs.weight', 'direction.sigma * inputs.weight'),
    Mutant('family: proposals of a failed step remembered', 'regularizer.py', '            self._state.discard_staged()\n', '            pass\n'),
    Mutant('family: earlier gradients remembered', 'step.py', 'alone = any(p.keeps == "apart" for p in self.plan.passes) or self.penalty.direction.averages == "results"', 'alone = any(p.keeps == "apart" for p in self.plan.passes)'),
    Mutant('family: frozen parameters forgotten in a checkpoint', 'state.py', 'if p.requires_grad or p in held', 'if p.requires_grad'),
    Mutant('family: memory in 16 bits', 'state.py', 'torch.float32 if p.dtype in LOW_PRECISION else p.dtype', 'p.dtype'),
    Mutant("family: ahead is back", "directions.py", "weight=-1.0 if direction.ahead else 1.0", "weight=1.0"),
    Mutant("each: loss's own share forgotten", "closures.py", "return self.share if self.scaler is None", "return 1.0 if self.scaler is None", EACH),
    Mutant("each: exact penalty's share forgotten", "exact.py", " * evaluator.share\n", "\n", EACH),
    Mutant("each: one perturbation for all", "regularizer.py", "parts = [[one] for one in closures]", "parts = [closures]", EACH),
    Mutant("each: gradients of earlier micro-batches not put back", "regularizer.py", "            restore_gradients(first.trainable, before)\n            raise", "            raise", EACH),
    Mutant("train: each group has all of the L2", "../train/loop.py", "l2=1.0 / parts if m is not None", "l2=1.0 if m is not None", ("train/test_options.py::test_every_group_of_m_samples_has_a_perturbation_of_its_own",)),
    Mutant("tail at the start", "../gates.py", "return Delay(value=inner, steps=start) if start else inner", "return inner", TAIL),
    Mutant("a run without a regularized step passes", "../penalties.py", "if isinstance(strength, Schedule) and not any(", "if isinstance(strength, Schedule) and not all(", TAIL),
    Mutant("held-out: sign of the correction", "held_out.py", "change[p] = change[p] - gradient if", "change[p] = gradient - change[p] if", HELD_OUT),
    Mutant("held-out: loss scale left in", "held_out.py", "return float(product / self._scale**2)", "return float(product)", HELD_OUT),
    Mutant("held-out: a trace is left", "closures.py", "            self._go_to(start)\n            self._state.search_again()", "            self._state.search_again()", HELD_OUT),
    Mutant("held-out: plain gradient not put back while off", "regularizer.py", "                measurement.put_plain()\n", "", HELD_OUT),
    Mutant("held-out: decision held at once", "held_out.py", "        self._decided = _Decision(self._state.helps)\n\n    def state_dict", "        self.helps = _Decision(self._state.helps).read()\n\n    def state_dict", HELD_OUT),
    Mutant("held-out: standard error forgotten", "../held_out.py", "average < -self.off * error", "average < 0.0", HELD_OUT),
    Mutant("held-out: products not in units of those before", "../held_out.py", "shrunk, s = before / unit, product / unit", "shrunk, s = 1.0, product", ("test_held_out.py",)),
    Mutant("held-out: a product's own size weighs it", "../held_out.py", "size > _LARGEST * before, size / _LARGEST, before", "size > before, size, before", ("test_held_out.py",)),
    Mutant("held-out: old products in old units", "../held_out.py", "kept * shrunk * state.mean", "kept * state.mean", ("test_held_out.py",)),
    Mutant("held-out: does not come back", "../held_out.py", "(average > self.on * error), 1.0, helps)", "(average > 1e9), 1.0, helps)", HELD_OUT),
    Mutant('auto radius: direction of the change reversed', '../auto_radius.py', 'self.gain * (cosine - self.target)', 'self.gain * (self.target - cosine)', AUTO_RADIUS),
    Mutant('auto radius: change not clipped', '../auto_radius.py', 'change = ops.clip(self.gain * (cosine - self.target) / (1.0 - self.target), -self.gain, self.gain)', 'change = self.gain * (cosine - self.target) / (1.0 - self.target)', AUTO_RADIUS),
    Mutant('auto radius: falling losses not counted', '../auto_radius.py', 'leaves = rising < _FEWEST_RISES', 'leaves = rising < -1.0', AUTO_RADIUS),
    Mutant('auto radius: nonlinearity not bounded', '../auto_radius.py', '(1.0 + _LARGEST_NONLINEARITY)', '1e9', AUTO_RADIUS),
    Mutant('auto radius: not halved at an infinite loss', '../auto_radius.py', 'ops.where(ops.isfinite(measured.rise), change, -math.log(2.0))', 'change', AUTO_RADIUS),
    Mutant('auto radius: growing steps unnoticed', '../auto_radius.py', 'grows = norm > _LARGEST_GROWTH * usual', 'grows = norm > 1e9 * usual', AUTO_RADIUS),
    Mutant('auto radius: one batch counts as growth', '../auto_radius.py', '_NORM_MEMORY = 0.8', '_NORM_MEMORY = 0.0', AUTO_RADIUS),
    Mutant('auto radius: a gradient that stays larger never usual', '../auto_radius.py', '(1.0 + _USUAL_RISES) * usual', 'usual', AUTO_RADIUS),
    Mutant('auto radius: growth shrinks it without end', '../auto_radius.py', 'math.log(_LEAST_OF_START * self.start)', 'math.log(self.lower)', AUTO_RADIUS),
    Mutant('auto radius: an infinite norm is usual', '../auto_radius.py', 'known = moves & ops.isfinite(size)', 'known = moves', AUTO_RADIUS),
    Mutant('auto radius: an opposed gradient taken away', '../auto_radius.py', 'return finite & (measured.product >= 0.0) if guards.backward else finite', 'return finite', AUTO_RADIUS),
    Mutant('auto radius: not halved at an opposed gradient', '../auto_radius.py', '            change = ops.where(cosine < 0.0, -math.log(2.0), change)', '            pass', AUTO_RADIUS),
    Mutant('auto radius: a zero gradient moves it', '../auto_radius.py', 'moves = measured.plain > 0.0', 'moves = measured.plain > -1.0', AUTO_RADIUS),
    Mutant('auto radius: no plain gradient in place of an infinite one', 'step.py', '                work.measurement.guard(', '                (lambda *a, **k: None)(', AUTO_RADIUS),
    Mutant('auto radius: earlier gradients lost by the guard', 'auto_radius.py', '            if present is not None:\n', '            if False:\n', AUTO_RADIUS),
    Mutant('auto radius: weight of the plain pass forgotten', 'auto_radius.py', 'first, other = self._weight * scale, weight * scale', 'first, other = 1.0, weight * scale', AUTO_RADIUS),
    Mutant('auto radius: not in a checkpoint', 'regularizer.py', '            self._radius.load_state_dict(state["radius"])\n', '            pass\n', AUTO_RADIUS),
    Mutant('auto radius: a failed step counted', 'regularizer.py', '            control.begin()\n', '            pass\n', AUTO_RADIUS),
    Mutant('auto radius: gradients overwritten that are measured', 'step.py', 'this.keeps == "nothing" and self.penalty.direction.is_gradient and not step', 'not step', AUTO_RADIUS),
    Mutant('family: parameters that only a moved pass reaches not mixed', 'step.py', 'apart = {p: apart[p] if p in apart else torch.zeros_like(p, requires_grad=False) for p in shards}', 'shards = {p: s for p, s in shards.items() if p in apart}'),
    Mutant('sparse gradients as they are', 'gradients.py', 'g.to_dense() if g.is_sparse else g for _, g in held', 'g for _, g in held'),
    Mutant('ascent checked where it is used', 'regularizer.py', 'if penalty is not None and ascents is not None:', 'if penalty is not None and ascents is not None and penalty.strength_at(number) != 0.0:'),
    Mutant('family: signs of every step the same', 'directions.py', 'signs(direction.seed, inputs.step,', 'signs(direction.seed, 0,'),
    Mutant('family: gap not orthogonal', 'mixing.py', '1.0 + mixing.a * ratio_or_zero(along, squared)', '1.0 + mixing.a'),
    Mutant('family: gap added', 'mixing.py', 'alpha=-mixing.a)', 'alpha=mixing.a)'),
    Mutant("family: reused part not orthogonal", "mixing.py", "-ratio_or_zero(along, squared)", "-ratio_or_zero(along, squared) * 0"),
    Mutant("family: reused part not rescaled", "mixing.py", "a * ratio_or_zero(norm_of_shards(gradients, like), norm_of_shards(reused, like))", "torch.tensor(a)"),
    Mutant("family: plain gradient's own weight forgotten", 'step.py', '            torch._foreach_add_(inputs.result, inputs.plain, alpha=self.plan.plain_weight)\n', '            pass\n'),
    Mutant('family: decoupled overflow hidden', 'step.py', 'torch._foreach_add_(inputs.plain, inputs.result, alpha=0.0)', 'pass'),
    Mutant("family: decoupled step with the wrong sign", "decoupled.py", "alpha=-rate)", "alpha=rate)"),
    Mutant('family: each ascent step of the whole radius', 'step.py', 'ascent, step.plan.passes[i + 1].offset - this.offset)', 'ascent, 1.0)'),
    Mutant('family: one ascent step for all', '../plan.py', 'for i in range(1, ascent_steps)', 'for i in range(0)'),
    Mutant('family: mask ignored', 'step.py', '        if mask is not None and ascent.vectors:', '        if False:'),
    Mutant("family: smallest gradients chosen", "masks.py", "    return [g.to(wide).abs() >= smallest", "    return [g.to(wide).abs() < smallest"),
    Mutant('family: mask never refreshed', 'masks.py', 'return self._mask.needs_gradient and self._state.period != self._refresh(step)', 'return self._mask.needs_gradient and self._state.period is None'),
    Mutant("family: all layers are norms", "masks.py", "if \"norm\" in type(module).__name__.lower()", "if True"),
    Mutant("draws: signs reversed", "draws.py", "raised.bitwise_not_()", "raised"),
    Mutant("draws: what a signed shift drags in stays", "draws.py", "spare.bitwise_and_((1 << (32 - shift)) - 1)", "spare"),
    Mutant("draws: every block the same", "draws.py", "rows.first + i * size", "rows.first"),
    Mutant("draws: choices compared with their signs", "draws.py", "words.bitwise_xor_(_HIGHEST).lt_(bound + _HIGHEST)", "words.lt_(bound + _HIGHEST)"),
    Mutant("family: compensation dropped", "../penalties.py", "value=k if compensate else 1.0", "value=1.0"),
    Mutant('family: cost of a part of the batch not counted', 'regularizer.py', 'plan.evaluations(ascent_share)', 'plan.evaluations()'),
    Mutant("train: a flipped bit of a checkpoint passed", "../train/checkpoints/folders.py", "if _description(path) != expected:", "if False:", ("train/checkpoints/test_folders.py",)),
    Mutant("train: a truncated checkpoint passed", "../train/checkpoints/folders.py", "if path.stat().st_size != expected[\"bytes\"]:", "if False:", ("train/checkpoints/test_folders.py",)),
    Mutant("train: a failed checkpoint left", "../train/checkpoints/folders.py", "            shutil.rmtree(unfinished, ignore_errors=True)\n", "", ("train/checkpoints/test_folders.py",)),
    Mutant("train: the oldest checkpoints kept", "../train/checkpoints/folders.py", "return sorted(found, reverse=True)", "return sorted(found)", ("train/checkpoints/test_folders.py",)),
    Mutant("train: one checkpoint too many kept", "../train/checkpoints/folders.py", "self.all()[self.keep :]", "self.all()[self.keep + 1 :]", ("train/checkpoints/test_folders.py",)),
    Mutant("train: PyTorch's random numbers not restored", "../train/checkpoints/save_and_load.py", "    torch.set_rng_state(state[\"torch\"])\n", "", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: Python's random numbers not restored", "../train/checkpoints/save_and_load.py", "    random.setstate((version, tuple(numbers), gauss))\n", "", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: random numbers not restored by a resume", "../train/checkpoints/save_and_load.py", "            set_random_state(own[\"random\"])\n", "", ("train/test_interruptions.py::test_a_run_told_to_stop_saves_itself_and_goes_on",)),
    Mutant("train: each process resumes the first one's random numbers", "../train/checkpoints/save_and_load.py", "own = _load(checkpoint / _of_process(devices.rank))", "own = _load(checkpoint / _of_process(0))", ("train/test_processes.py::test_two_processes_go_on_as_if_they_had_not_been_interrupted",)),
    Mutant("train: the same random numbers in every process", "../train/loop.py", "if devices.rank > 0:  # after", "if False:  # after", ("train/test_processes.py::test_each_process_draws_numbers_of_its_own",)),
    Mutant("train: a process's share of an uneven batch forgotten", "../train/loop.py", "whole = self.devices.processes * batch.share", "whole = 1.0", ("train/test_processes.py::test_two_processes_train_as_one",)),
    Mutant("train: a process's share forgotten in AutoL2's measurement", "../train/loop.py", " * (self.devices.processes * batch.share)", "", ("train/test_processes.py::test_two_processes_measure_the_whole_batch_for_the_weight_decay",)),
    Mutant("train: micro-batches weighed alike", "../train/loop.py", "whole * (end - start) / size", "whole / parts", ("train/test_options.py::test_micro_batches_change_nothing_but_memory",)),
    Mutant("train: L2 in the loss of every micro-batch", "../train/loop.py", "else float(start == 0)", "else 1.0", ("train/test_options.py::test_l2_enters_the_loss_once_whatever_the_micro_batches",)),
    Mutant("train: decoupled step forgotten", "../train/loop.py", "        state.regularizer.decoupled_step(state.optimizer)\n", "", ("train/test_options.py::test_a_decoupled_penalty_moves_the_weights_beside_the_optimizer",)),
    Mutant("train: running mean not restored", "../train/checkpoints/save_and_load.py", "            self.ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / _EMA))\n", "", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: count of the running mean not restored", "../train/checkpoints/save_and_load.py", "            self.ema.n_averaged.fill_(shared[\"ema_updates\"])\n", "", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: running mean without statistics", "../train/loop.py", "use_buffers=True", "use_buffers=False", ("train/test_options.py::test_the_ema_is_the_running_mean_of_the_weights_and_statistics",)),
    Mutant("train: loss scale not restored", "../train/checkpoints/save_and_load.py", "        self.scaler.load_state_dict(shared[\"scaler\"])\n", "", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: AutoL2 not restored", "../train/checkpoints/save_and_load.py", "            self.weight_decay.load_state_dict(shared[\"weight_decay\"])\n", "            pass\n", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: best weights not restored", "../train/checkpoints/save_and_load.py", "if devices.main and best.is_file() else None", "if False else None", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: optimizer not restored", "../train/checkpoints/save_and_load.py", "            self.optimizer.load_state_dict(optimizer)\n", "", ("train/test_interruptions.py::test_a_run_told_to_stop_saves_itself_and_goes_on",)),
    Mutant("train: step not restored", "../train/checkpoints/save_and_load.py", "            self.regularizer.load_state_dict(own[\"regularizer\"])\n            set", "            set", ("train/checkpoints/test_save_and_load.py",)),
    Mutant("train: worst epoch kept as the best", "../train/loop.py", "metric.is_better(record.judged_by(metric)[1], best_before.judged_by(metric)[1])", "metric.is_better(best_before.judged_by(metric)[1], record.judged_by(metric)[1])", ("train/test_options.py::test_the_best_epochs_weights_are_kept",)),
    Mutant("train: last of equal epochs kept as the best", "../train/loop.py", "metric.is_better(record.judged_by(metric)[1], best_before.judged_by(metric)[1])", "not metric.is_better(best_before.judged_by(metric)[1], record.judged_by(metric)[1])", ("train/test_options.py::test_of_equal_epochs_the_first_is_the_best",)),
    Mutant("train: best epoch by the test set", "../train/outcome.py", "name = metric.test if self._value(metric.validation) is None else metric.validation", "name = metric.test", ("train/test_options.py::test_the_best_epochs_weights_are_kept",)),
    Mutant("train: schedule a step behind", "../train/loop.py", "self.schedule.step_update(state.regularizer.step)", "self.schedule.step_update(state.regularizer.step - 1)", ("train/test_loop.py::test_the_loop_equals_ten_lines_of_plain_pytorch",)),
    Mutant("train: schedule by the epoch's batches", "../train/loop.py", "self.schedule.step_update(state.regularizer.step)", "self.schedule.step_update(state.progress.batch)", ("train/test_loop.py::test_the_loop_equals_ten_lines_of_plain_pytorch",)),
    Mutant("train: labels smoothed in evaluation", "../train/objective.py", "cross_entropy(outputs, targets, reduction=\"sum\")", "cross_entropy(outputs, targets, reduction=\"sum\", label_smoothing=0.1)", ("train/test_loop.py::test_evaluation_counts_every_example_once_in_evaluation_mode",)),
    Mutant("train: labels not smoothed in training", "../train/objective.py", "label_smoothing=self._smoothing, ", "", ("train/test_loop.py::test_the_loop_equals_ten_lines_of_plain_pytorch",)),
    Mutant("train: evaluation in training mode", "../train/evaluation.py", "    model.eval()\n", "", ("train/test_loop.py::test_evaluation_counts_every_example_once_in_evaluation_mode",)),
    Mutant("train: a batch's images evaluated by every process", "../train/data/sampler.py", "rows = torch.arange(self.rank * n // self.processes, (self.rank + 1) * n // self.processes)", "rows = torch.arange(n)", ("train/data/test_loader.py",)),
    Mutant("train: an image of nobody evaluated twice", "../train/data/loader.py", "batches = [indices for indices in batches if indices.share]", "batches = list(batches)", ("train/data/test_loader.py",)),
    Mutant("train: another number of micro-batches in each process", "../train/data/sampler.py", "fewest=max(1, n // self.processes)", "fewest=max(1, len(rows))", ("train/data/test_loader.py",)),
    Mutant("train: biases and norms decay", "../train/optimization.py", "filter_bias_and_bn=not self.decay_biases_and_norms", "filter_bias_and_bn=False", ("train/test_optimization.py",)),
    Mutant("train: biases and norms decay with an optimizer of torch", "../train/optimization.py", "spared = self.weight_decay > 0 and not self.decay_biases_and_norms", "spared = False", ("train/test_optimization.py",)),
    Mutant("train: holdout not by the split's seed", "../train/data/splits.py", "manual_seed(seed if config.split_seed is None else config.split_seed)", "manual_seed(seed)", ("train/data/test_splits.py",)),
    Mutant("train: holdout the same for every seed", "../train/data/splits.py", "manual_seed(seed if config.split_seed is None else config.split_seed)", "manual_seed(config.split_seed or 0)", ("train/data/test_splits.py",)),
    Mutant("train: held-out images trained on", "../train/data/splits.py", "Subset(chosen[: size - held], noisy[: size - held])", "Subset(chosen, noisy)", ("train/data/test_splits.py",)),
    Mutant("train: batches of a resumed epoch from its beginning", "../train/data/sampler.py", "[checks.whole(\"start\", start, minimum=0) :]", "", ("train/data/test_loader.py",)),
    Mutant("train: gradient not clipped", "../train/loop.py", "            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)\n", "", ("train/test_loop.py::test_the_loop_equals_ten_lines_of_plain_pytorch",)),
    Mutant("train: scaled gradient clipped", "../train/loop.py", "            state.scaler.unscale_(state.optimizer)\n", "", ("train/test_options.py::test_half_precision_trains_with_weights_in_fp32",)),
    Mutant("train: metrics of a resumed run begun anew", "../train/run_folder.py", "\"\".join(map(_metrics_line, history))", "\"\"", ("train/test_interruptions.py::test_a_run_told_to_stop_saves_itself_and_goes_on",)),
    Mutant("train: folder shared by two configurations", "../train/run_folder.py", "        self.check_free_for(config)\n", "", ("train/test_run_folder.py",)),
    Mutant("train: colours of the other data in an evaluation", "../train/evaluate_command.py", "        config.augmentation.normalize = trained.data.name\n", "        pass\n", ("train/test_evaluate.py",)),
    Mutant("train: options of a block dropped", "../train/arguments.py", "{**block, **one.value} if", "{**block, **one.value, \"options\": block.get(\"options\", {})} if", ("train/test_arguments.py",)),
    Mutant("train: the recipe's keys left under another name", "../train/arguments.py", "else {}\n    for one", "else before\n    for one", ("train/test_arguments.py",)),
    Mutant("train: norm not measured where it is logged", "../train/loop.py", "state.progress.batch + 1 == self.steps_per_epoch", "False", ("train/test_loop.py",)),
    Mutant("train: warning of harm forgotten", "../train/loop.py", "        warn_of_harm(config.optimizer, config.schedule, self.penalty.penalty, steps_per_epoch=self.steps_per_epoch)\n", "", ("train/test_options.py::test_an_adaptive_optimizer_that_warms_up_under_a_whole_penalty_is_warned_of",)),
    Mutant("train: every seed of a plan the first", "../train/configuration.py", "        other.seed = checks.seed(seed)\n", "", ("train/test_parsed_once.py",)),
    Mutant("train: steps of an epoch rounded down", "../train/configuration.py", "math.ceil((images - self._penalty", "math.floor((images - self._penalty", ("train/data/test_configuration.py", "study/test_plan.py")),
    Mutant("train: a warm-up in epochs of as many steps", "../train/penalty.py", "round(self.warmup_epochs * steps_per_epoch)", "round(self.warmup_epochs)", ("train/test_options.py::test_a_warm_up_may_be_counted_in_epochs",)),
    Mutant("train: cosine without its end", "../train/optimization.py", "self._end + 0.5 * (peak - self._end) * fall", "0.5 * peak * fall", ("train/test_optimization.py",)),
    Mutant("train: a parameter frozen and yet given to the optimizer", "../train/optimization.py", "[p for p in model.parameters() if p.requires_grad]", "list(model.parameters())", ("train/test_optimization.py",)),
    Mutant("train: what is typed for a block replaces it", "../train/arguments.py", "{**block, one.path[0]: one.value}", "{one.path[0]: one.value}", ("train/test_arguments.py",)),
    Mutant('swapped parameters not pointed back', 'perturbation.py', '        for one in self._swapped:\n            one.point_back()\n        for record in self._copied:\n            torch._foreach_copy_(record.shards, record.copies)\n        if self._noise is not None:', '        for record in self._copied:\n            torch._foreach_copy_(record.shards, record.copies)\n        if self._noise is not None:'),
    Mutant('swapped copies mirrored at the wrong place', 'perturbation.py', '[one.original for one in self._swapped], 2.0)', '[one.original for one in self._swapped], 1.0)'),
    Mutant('memory that others share swapped', 'perturbation.py', ' and _users_of(storage) <= _users_of_a_parameter()', ''),
    Mutant('loaded weights overwritten by a late repair', 'perturbation.py', '            if one.is_untouched():', '            if True:'),
    Mutant('loaded weights overwritten by a late repair of copies', 'perturbation.py', '                if version in (-1, p._version):', '                if True:'),
    Mutant('state: later passes start where the first ended', 'closures.py', '            if i < len(group.starts):\n                self._go_to', '            if False:\n                self._go_to'),
    Mutant('state: closure starts where the ascent ended', 'closures.py', '                    self._go_to(other.starts[0])', '                    pass'),
    Mutant('state: attributes not looked at', 'buffers.py', '    for key, value in [*vars(module).items()]:', '    for key, value in []:'),
    Mutant('state: frozen parameters not looked at', 'buffers.py', 'if p is not None and not p.requires_grad)', 'if False)'),
    Mutant('state: a change of mode unnoticed', 'buffers.py', '        self._searching = self._searched = self._mode_now(trainable) != self._mode', '        self._searching = self._mode is None'),
    Mutant('random numbers of python not replayed', 'rng.py', '        self._python.restore(python)\n', ''),
    Mutant('the second of a pair of normal numbers is drawn anew', 'rng.py', 'elif self.capture() != state:', 'elif self.capture()[0] != state[0]:'),
    Mutant('random numbers of numpy not replayed', 'rng.py', '            self._numpy.restore(numpy)', '            pass'),
    Mutant('generators of modules not replayed', 'rng.py', '            _set_state_of(generator, state)', '            pass'),
    Mutant('cached parametrizations kept', 'parallel.py', '            parametrize._cache.clear()', '            pass'),
    Mutant('parameters that joined unnoticed', 'watch.py', '        if joined:', '        if False:'),
    Mutant('underflow not noticed', 'norms.py', '        norm = _norm_in([t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]).float()', '        pass'),
    Mutant('rounding in 32 bits unnoticed', 'perturbation.py', '    if cosine >= _FAITHFUL:', '    if cosine >= _FAITHFUL or not any(t.dtype in LOW_PRECISION for t in before):'),
    Mutant('hidden gradients taken for none', 'exact.py', '        if self.evaluator.parallelism.averages or all(p.grad is None for p in unreached):', '        if True:'),
    Mutant('repeats_pass always false', 'closures.py', '        self.repeats_pass = self._sharing and i < len(group.starts)', '        self.repeats_pass = False'),
    Mutant('late binding unnoticed', 'closures.py', '        if other is not closure:', '        if False:'),
    Mutant('unknown parts taken for what they derive from', '../registry.py', '    if type(part) not in function.registry:', '    if function.dispatch(type(part)) is function.dispatch(object):'),
    Mutant('the clock set by step= ignored', 'regularizer.py', 'number = self._step if step is None else', 'number = self._step if True else'),
    Mutant("study: a longer baseline rounded down", "../study/plan.py", "math.ceil(length * Fraction(cost[1])", "math.floor(length * Fraction(cost[1])", ("study/test_functions.py",)),
    Mutant("study: a run not lengthened", "../study/run.py", "_Length(unit, n, math.ceil(n * self._stretch))", "_Length(unit, n, n)", ("study/test_functions.py",)),
    Mutant("study: the best epoch of a metric to be minimized is the largest", "../study/tasks.py", 'return value > than if self.mode == "max" else value < than', "return value > than", ("study/test_functions.py",)),
    Mutant("study: gradients of an integration not counted", "../study/run.py", '(one := getattr(made, "regularizer", made)) is not None', "False", ("study/test_functions.py",)),
    Mutant("study: changed source unnoticed", "../study/functions.py", '"code": self.source}', '"code": None}', ("study/test_functions.py",)),
    Mutant("own: a metric's batches weighed alike", "../train/objective.py", "[value.double() * samples if", "[value.double() if", ("train/test_own.py",)),
    Mutant("own: larger errors are better", "../train/outcome.py", "metric.is_better(epoch.judged_by(metric)[1], best.judged_by(metric)[1])", "epoch.judged_by(metric)[1] > best.judged_by(metric)[1]", ("train/test_own.py",)),
    Mutant("own: a changed file unnoticed", "../own_code.py", 'if file is not None and digest(file) != held["sha256"]:', "if False:", ("train/test_own.py",)),
    Mutant("own: the working directory before the recipe's folder", "../own_code.py", "[folder.resolve() for folder in ([beside] if beside is not None else [])] + [Path.cwd()]", "[Path.cwd()] + [folder.resolve() for folder in ([beside] if beside is not None else [])]", ("train/test_own.py",)),
    Mutant("own: splits that may overlap", "../train/data/samples.py", "if _random_states() != before:", "if False:", ("train/test_own.py",)),
    Mutant("own: samples draw from the run's generator", "../train/data/samples.py", "                    _seed_all(first + 0x9E3779B97F4A7C15 * position)\n", "", ("train/test_own.py",)),
    Mutant("own: held-out samples trained on", "../train/data/samples.py", "order[: size - held], order[size - held : size]", "order[:size], order[size - held : size]", ("train/test_own.py",)),
    Mutant("study: a regularizer of another run accepted", "../study/run.py", "        if stolen:", "        if False:", ("study/test_broken_tasks.py",)),
    Mutant("study: workers outlive their parent", "../study/executors/local.py", "    threading.Thread(target=_end_with_parent, daemon=True).start()\n", "", ("study/test_functions.py",)),
    Mutant("study: a failed run ends the study", "../study/job_run.py", "    except Exception as error:\n        files.write_text", "    except ZeroDivisionError as error:\n        files.write_text", ("study/test_broken_tasks.py",)),
    Mutant("executors: a run that dies goes on for ever", "../study/running.py", "if counts[ended.key] < most:", "if counts[ended.key] < 50:", ("study/test_executors.py::test_deaths_of_a_run_are_counted_and_losses_of_its_machine_apart",)),
    Mutant("executors: losses of a machine counted as deaths", "../study/running.py", "(deaths, DEATHS) if ended.own else (losses, LOSSES)", "(deaths, DEATHS)", ("study/test_executors.py::test_deaths_of_a_run_are_counted_and_losses_of_its_machine_apart",)),
    Mutant("executors: another version on a worker unnoticed", "../study/executors/order.py", "        if differ:", "        if False:", ("study/test_executors.py::test_a_worker_of_another_version_names_both",)),
    Mutant("executors: any folder of the same path taken for the study's", "../study/executors/order.py", 'if file.read_text() == seen["token"]:', "if file.read_text() or True:", ("study/test_executors.py::test_a_worker_that_does_not_see_the_folder_says_so_within_ten_seconds",)),
    Mutant("executors: the result uploaded first", "../study/urls.py", "key=lambda file: file.name == RESULT", "key=lambda file: file.name != RESULT", ("study/test_executors.py::test_the_result_of_a_run_is_uploaded_last_and_no_driver_writes_beside_another",)),
    Mutant("executors: a driver at a URL that others renew is taken for dead", "../study/urls.py", 'time.time() - held["renewed"] < _DEAD', "False", ("study/test_executors.py::test_the_result_of_a_run_is_uploaded_last_and_no_driver_writes_beside_another",)),
    Mutant("executors: runs of before not found where they were", "../study/comparison.py", "            if before.is_dir() and not place.exists():", "            if False:", ("study/test_executors.py::test_a_study_that_grew_finds_its_runs_where_they_were",)),
    Mutant("executors: all seeds in one folder", "../study/plan.py", "(self.seed - self.variant.seed) // MOST_IN_FOLDER", "0", ("study/test_executors.py::test_no_folder_holds_thousands_of_entries_and_studies_of_before_still_open",)),
    Mutant("study: a baseline that costs as much compared with a longer one", "../study/plan.py", "if needed > length:", "if needed >= length:", ("study/test_plan.py", "study/test_functions.py")),
    Mutant("study: what did not decide a race judged as if its seeds were fixed", "../study/racing.py", "return sample.interval(1 - float(self.levels(1)[0, look]))", "return sample.interval(self.level)", ("study/test_racing.py",)),
    Mutant("study: seconds measured again", "../study/stored_plan.py", "seconds=self.seconds if \"seconds\" in plan.rivals else {}", "seconds={}", ("study/test_seconds.py",)),
    Mutant("seconds: the first epochs timed as well", "../study/seconds.py", "for mark in self.marks if mark[0] >= length]", "for mark in self.marks]", ("study/test_seconds.py",)),
    Mutant("seconds: rounds that do not agree are enough", "../study/seconds.py", "return len(rounds) >= ROUNDS_OF_LONG_RUNS and high < AGREE * low", "return True", ("study/test_seconds.py",)),
    Mutant("seconds: per epoch forgotten", "../study/seconds.py", "scale = within[0] / own_within[0]", "scale = 1.0", ("study/test_seconds.py",)),
    Mutant("study: compilation counted as training in the ratio of seconds", "../study/seconds.py", "seconds, own_seconds = long.seconds - short.seconds, own_long.seconds - own_short.seconds", "seconds, own_seconds = long.seconds, own_long.seconds", ("study/test_seconds.py",)),
    Mutant("study: the result of another run taken", "../files.py", "if OWNER in values and values[OWNER] != _digest(owner):", "if False:", ("study/test_functions.py::test_results_that_were_exchanged_are_named", "train/test_run_folder.py::test_the_result_of_another_run_is_named")),
    Mutant("study: a race with another bound goes on", "../study/stored_plan.py", "if before is not None and race is not None and before != race:", "if False:", ("study/test_until.py",)),
    Mutant("study: results that have changed since a look unnoticed", "../study/stored_plan.py", "            if not same and not stored[\"failed\"]:", "            if False:", ("study/test_until.py",)),
    Mutant("study: warnings without the task's line", "../study/functions.py", 'f"{text} ({_line_of(train.function)})"', 'f"{text}"', ("study/test_broken_tasks.py",)),
    Mutant("study: the last best epoch in place of the first", "../study/ending.py", "if best is None or metric.is_better(record[validation], best[validation])", "if best is None or not metric.is_better(best[validation], record[validation])", ("study/test_ending.py",)),
    Mutant("study: seeds that change nothing unnoticed", "../study/results.py", "len(set(ended)) == 1 and", "False and", ("study/test_broken_tasks.py",)),
    Mutant("study: started by a worker that imports the script", "../study/executors/local.py", "if getattr(multiprocessing.current_process()", "if multiprocessing.parent_process() is not None and getattr(multiprocessing.current_process()", ("study/test_compare.py::test_a_script_without_its_guard_is_told_so",)),
    Mutant("tune: tables that another process makes", "../study/searcher.py", "if attempts and any(", "if False and any(", ("study/test_search.py::test_tables_that_another_process_makes_at_the_same_moment_are_taken",)),
    Mutant("tune: connections left open", "../study/searcher.py", "engine.dispose()", "pass", ("study/test_search.py::test_tables_that_another_process_makes_at_the_same_moment_are_taken",)),
    Mutant("tune: what is ahead is dropped", "../study/search.py", "mean < float(special", "-mean < float(special", ("study/test_search.py",)),
    Mutant("tune: the spread of other trials unused", "../study/search.py", "sum(one[1] for one in pooled)", "0", ("study/test_search.py",)),
    Mutant("tune: the worst chosen", "../study/search.py", "sign * one.mean, -one.number", "-sign * one.mean, -one.number", ("study/test_search.py",)),
    Mutant("tune: selects by test", "../study/searcher.py", "found = record.validation", "found = record.test", ("study/test_search.py",)),
    Mutant("tune: confirmed with the seeds of the trials", "../study/tuning.py", "range(first + seeds, first + seeds + confirm)", "range(first, first + confirm)", ("study/test_search.py",)),
    Mutant("tune: plain training searched less", "../study/searcher.py", "counts[arm.name] < self.search.trials", "counts[arm.name] < self.search.trials - (arm.penalty is None)", ("study/test_search.py",)),
    Mutant("tune: a dead process's trial left", "../study/searcher.py", "                if not ended:", "                if True:", ("study/test_search.py",)),
    Mutant("tune: what a trial had found forgotten when it is taken over", "../study/searcher.py", 'if key == "progress"}', 'if key == "nothing"}', ("study/test_search.py",)),
    Mutant("sharpness: differences not halved", "../sharpness/products.py", "return ahead.sub_(behind).div_(2 * step)", "return ahead.sub_(behind).div_(step)", ("sharpness/test_eigenvalues.py::test_eigenvalues_are_those_of_the_whole_hessian",)),
    Mutant("sharpness: the stated error of differences too small", "../sharpness/products.py", "self.error = math.hypot(a * self.step**2, b / self.step)", "self.error = 0.01 * math.hypot(a * self.step**2, b / self.step)", ("sharpness/test_differences.py::test_differences_are_exact_to_a_thousandth_and_know_their_error",)),
    Mutant("sharpness: eigenvalues in ascending order", "../sharpness/lanczos.py", "values, inner = values[::-1], inner[:, ::-1]", "values, inner = values, inner", ("sharpness/test_eigenvalues.py::test_all_eigenvalues_of_a_small_quadratic_with_repeated_ones",)),
    Mutant("evaluation: an edge in the bin above it", "../evaluation/calibrations.py", 'side="left"', 'side="right"', ("evaluation/test_calibration.py",)),
    Mutant("evaluation: bins not weighted by their samples", "../evaluation/calibrations.py", "b.samples * abs(", "abs(", ("evaluation/test_calibration.py",)),
    Mutant("evaluation: the likelihood of what is predicted", "../evaluation/calibrations.py", "log_p[samples, truth]", "log_p[samples, predicted]", ("evaluation/test_calibration.py",)),
    Mutant("evaluation: a scale that leaves out zero", "../evaluation/rounding.py", "    low = groups.amin(-1, keepdim=True).clamp(max=0.0)", "    low = groups.amin(-1, keepdim=True)", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: one level too many", "../evaluation/rounding.py", "2**bits - 1).flatten(1)", "2**bits).flatten(1)", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: the last group left as it is", "../evaluation/rounding.py", "    done = [_rounded(part, 2**bits - 1).flatten(1) for part in parts if part.numel()]", "    done = [(_rounded(part, 2**bits - 1) if part is parts[0] else part).flatten(1) for part in parts if part.numel()]", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: rounded weights stay", "../evaluation/rounding.py", "            p.copy_(original)", "            pass", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: casts of rounded weights stay", "../evaluation/rounding.py", "            p.copy_(original)\n        drop_copies()", "            p.copy_(original)", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: embeddings rounded too", "../evaluation/rounding.py", "id(p) not in embedded", "True", ("evaluation/test_rounding.py",)),
    Mutant("evaluation: what a loss writes stays", "../evaluation/losses.py", "        state.restore(start)", "        pass", ("evaluation/test_losses.py",)),
    Mutant("evaluation: modes of parts forgotten", "../evaluation/losses.py", "            m.training = training", "            m.training = True", ("evaluation/test_losses.py",)),
    Mutant("evaluation: forgetting the wrong way round", "../evaluation/losses.py", "self._loss() - self.before", "self.before - self._loss()", ("evaluation/test_losses.py",)),
    Mutant("evaluation: sizes of closures forgotten", "../evaluation/losses.py", "return [size / sum(found) for size in found]", "return [1 / len(found) for size in found]", ("evaluation/test_losses.py",)),
    Mutant("evaluation: always in eval mode", "../evaluation/losses.py", 'm.training = mode == "train"', "m.training = False", ("evaluation/test_losses.py",)),
    Mutant("study: runs that diverged in what is logged beside", "../study/logged.py", " and run.test is not None and not run.diverged", "", ("study/test_logged.py",)),
    Mutant("study: a longer baseline for plain in what is logged beside", "../study/logged.py", 'row.variant == baseline and row.budget == "epochs"), [])', 'row.variant == baseline and row.budget != "epochs"), [])', ("study/test_logged.py",)),
    Mutant("study: the first value of what is logged beside", "../study/ending.py", "found = {name: value for record in records for", "found = {name: value for record in reversed(records) for", ("study/test_logged.py",)),
    Mutant("study: differences of what is logged not paired with plain", "../study/logged.py", "paired_difference(values, plain)", "paired_difference(plain, values)", ("study/test_logged.py",)),
    Mutant("sharpness: one eigenvalue alone ends in an error of NumPy's", "../sharpness/lanczos.py", "torch.from_numpy(weights.copy())", "torch.from_numpy(weights)", ("sharpness/test_bad_input.py::test_a_matrix_with_one_eigenvalue_alone",)),
    Mutant("sharpness: the deviation for the standard error", "../sharpness/spectra.py", "values.std(ddof=1) / math.sqrt(len(values))", "values.std(ddof=1)", ("sharpness/test_traces.py",)),
    Mutant("sharpness: a descent in place of the rise", "../sharpness/rises.py", "with function.at(unit, rho):", "with function.at(unit, -rho):", ("sharpness/test_rises.py",)),
    Mutant("sharpness: each closure's gradient not normalized", "../sharpness/rises.py", "function.at(gradient / norm, rho)", "function.at(gradient, rho)", ("sharpness/test_rises.py",)),
    Mutant("sharpness: the critical learning rate for its sharpness", "../sharpness/rises.py", "CriticalSharpness(value=2 / rate", "CriticalSharpness(value=rate", ("sharpness/test_rises.py",)),
    Mutant("sharpness: closures weighed alike", "../sharpness/function.py", "return [size / sum(found) for size in found]", "return [1 / len(found) for size in found]", ("sharpness/test_eigenvalues.py", "sharpness/test_penalized.py")),
    Mutant("sharpness: the mode of modules not restored", "../sharpness/function.py", "                m.training = training\n", "                pass\n", ("sharpness/test_unchanged.py",)),
    Mutant("sharpness: buffers and random numbers not restored", "../sharpness/function.py", "            self._perturbation.restore()\n            self._restore_state()\n", "            self._perturbation.restore()\n", ("sharpness/test_unchanged.py",)),
    Mutant("sharpness: a curvature that is not a number passed", "../sharpness/products.py", "    if not math.isfinite(largest):", "    if False:", ("sharpness/test_bad_input.py::test_curvature_that_is_not_a_number",)),
    Mutant("sharpness: a loss without second derivative passed", "../sharpness/products.py", "    if largest == 0 and function.point.norm > 0:", "    if False:", ("sharpness/test_bad_input.py",)),
    Mutant("sharpness: SAM's norm not held", "../sharpness/penalized.py", "gamma, relative = strength / norm,", "gamma, relative = strength,", ("sharpness/test_penalized.py",)),
    Mutant("sharpness: one side of a penalty's difference", "../sharpness/penalized.py", "for sign in (1.0, -1.0):", "for sign in (1.0, 1.0):", ("sharpness/test_penalized.py",)),
    Mutant("sharpness: runs measured in train mode", "../train/sharpness_recorder.py", 'mode="eval"', 'mode="train"', ("train/test_sharpness.py::test_evaluation_and_measurement_share_a_mode_that_is_left",)),
    Mutant("sharpness: the last epoch of a run not measured", "../train/sharpness.py", "(epoch % self.every == 0 or epoch == epochs)", "epoch % self.every == 0", ("train/test_sharpness.py::test_a_run_records_what_the_library_measures_and_is_the_run_that_it_would_have_been",)),
    Mutant("sharpness: a task's measurement in its seconds", "../study/run.py", "time.perf_counter() - self._started - self._measuring", "time.perf_counter() - self._started", ("train/test_sharpness.py::test_the_seconds_of_a_run_do_not_count_the_measurement",)),
    Mutant("sharpness: the variants' means left in a correlation within them", "../study/statistics.py", "        found[own] -= values[own].mean()\n", "        found[own] -= 0.0\n", ("study/test_statistics.py",)),
    Mutant("sharpness: an interval of too many pairs", "../study/statistics.py", "(1 + inside**2 / 2) / (m - 3)", "(1 + inside**2 / 2) / (m + 6)", ("study/test_statistics.py",)),
    Mutant("sharpness: SAM's edge with the strength for its inverse", "../theory/stability.py", "strength / norm if strength > 0 else 0.0, learning", "norm / strength if strength > 0 else 0.0, learning", ("theory/test_stability.py",)),
    Mutant("sharpness: a measured escape still called a trap", "../theory/advice.py", "traps = [one for one in traps if", "traps = [one for one in traps if True or", ("theory/test_stability.py",)),
    Mutant("sharpness: the edge experiment trains without SAM", "../theory/edge.py", "sam(rho=radius) if radius > 0 else None", "None", ("theory/test_edge.py",)),
    Mutant("probe: early climbs count as well", "../study/probing.py", "return self.climbs[len(self.climbs) // 2 :]", "return self.climbs", ("study/test_probing.py",)),
    Mutant("probe: trains with the whole penalty", "../study/probing.py", "WEIGHT = 0.01", "WEIGHT = 1.0", ("study/test_probing.py",)),
    Mutant("probe: between radii without the logarithm", "../study/probing.py", "part = (before - alignment) / (before - here) if before > here else 0.0", "part = 0.0", ("study/test_probing.py",)),
    Mutant("probe: nonlinearity without the radius", "../study/probing.py", "radius * (measured.plain if power == 2 else", "(measured.plain if power == 2 else", ("study/test_probing.py",)),
    Mutant("probe: climbs never end by the gradients", "../study/probing.py", "(cosine > FLOOR) & (measured.perturbed < _LONGEST**2 * measured.plain)", "(cosine > -2.0)", ("study/test_probing.py",)),
    Mutant("flat-lora: noise of the frozen weight alone", "adapted.py", "if not (over.merged or over.disable_adapters):", "if False:", ADAPTED),
    Mutant("flat-lora: variance without the width", "adapted.py", "/ weight.shape[1] ** 0.5", "/ 1.0", ADAPTED),
    Mutant("flat-lora: other noise in the backward pass", "adapted.py", "(gradient @ ctx.draw(weight).to(gradient.dtype))", "(gradient @ weight.to(gradient.dtype))", ADAPTED),
    Mutant("flat-lora: the same noise in every layer", "adapted.py", "hashed(self._seed, layer.index)", "hashed(self._seed, 0)", ADAPTED),
    Mutant("flat-lora: the same noise in every step", "directions.py", "hashed(direction.seed, inputs.step)", "hashed(direction.seed, 0)", ADAPTED),
    Mutant("flat-lora: layers left perturbed", "adapted.py", 'vars(layer.base).pop("forward", None)', "pass", ADAPTED),
    Mutant("flat-lora: backward goes the same way", "perturbation.py", "self._noise.distance = -self._noise.distance", "pass", ADAPTED),
    Mutant("flat-lora: sums kept for the backward pass", "adapted.py", "        ctx.save_for_backward(weight)\n", "        ctx.save_for_backward(weight)\n        ctx.kept = draw(weight)\n        draw = lambda _: ctx.kept\n        ctx.save_for_backward(ctx.kept)\n", ADAPTED),
    Mutant("flat-lora: the model is searched for writers every step", "buffers.py", 'len(m.__dict__) - ("forward" in m.__dict__)', "len(m.__dict__)", ("integrations/test_peft.py", "-klast_pass")),
    Mutant("clipping: the direction is not clipped", "directions.py", "factor=ratio.clamp(max=1.0) if isinstance(ratio, Tensor) else min(ratio, 1.0)", "factor=1.0", FAMILY),
    Mutant("clipping: the second gradient is not clipped", "mixing.py", "torch._foreach_mul_(inputs.result, _limited(", "(lambda *_: None)(inputs.result, _limited(", FAMILY),
    Mutant("clipping: the first gradient is not clipped", "mixing.py", "_limited(limit, norm_of_shards(inputs.plain, inputs.like)) * share", "share", FAMILY),
    Mutant("clipping: at the norm of the scaled gradients", "mixing.py", "mixing.max_norm * inputs.scale", "mixing.max_norm", ("torch/test_precision.py", "-kclipped")),
    Mutant("timm: the loop's variables not bound", "../integrations/timm.py", "bound = _bound(forward)", "bound = forward", TIMM),
    Mutant("timm: a factor of the loss lost", "../integrations/timm.py", "return loss * self.factor, loss", "return loss, loss", TIMM),
    Mutant("timm: not clipped", "../integrations/timm.py", "dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)", "pass", TIMM),
    Mutant("timm: clipped while scaled", "../integrations/timm.py", "self._scaler.unscale_(optimizer)", "pass", TIMM),
    Mutant("timm: resumed without the clock", "../integrations/timm.py", "            self.regularizer.load_state_dict(self._saved)\n", "            pass\n", TIMM),
    Mutant("bi-lora: the second adapter descends", "../integrations/peft.py", "p.register_hook(torch.neg)", "p.register_hook(torch.clone)", BI_LORA),
    Mutant("bi-lora: the ball is that of each factor", "../integrations/peft.py", ".clamp(max=1.0).sqrt()", ".clamp(max=1.0)", BI_LORA),
    Mutant("bi-lora: the scaling forgotten", "../integrations/peft.py", "scaling**2 * ", "1.0 * ", BI_LORA),
    Mutant("bi-lora: always scaled to the ball", "../integrations/peft.py", "(self.rho / self.norm()).clamp(max=1.0)", "(self.rho / self.norm())", BI_LORA),
    Mutant("bi-lora: evaluated with both", "../integrations/peft.py", "scaling if layer.training else 0.0", "scaling", BI_LORA),
    Mutant("bi-lora: the second adapter frozen when a Trainer resumes", "../integrations/peft.py", 'vars(model)["set_adapter"] = self._activate', "pass", BI_LORA),
)  # fmt: skip


def failures(mutant: Mutant, *, first: bool) -> list[str]:
    """The tests that fail with ``mutant`` in place, or the first of them."""
    likely = LIKELY.get(mutant.file, ()) if first and mutant.tests == ENGINE else ()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "gradreg" / "torch" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its text must be once in {mutant.file}; it is there {text.count(mutant.old)} times.")
        file.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(f"tests/torch/test_{name}.py" for name in likely),
            *(word if word.startswith("-") or word == "not slow" else f"tests/{word}" for word in mutant.tests),
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-rfE",
            *(["-x"] if first else []),
        ]
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", result.stdout, flags=re.MULTILINE)


def summary(failed: list[str]) -> str:
    """``test_file::test_name (count)`` of what failed, parametrized cases together."""
    counts = Counter(name.split("[")[0].replace(".py", "") for name in failed)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.most_common())


def main(words: list[str]) -> int:
    first, words = "--first" in words, [word for word in words if word != "--first"]
    survivors = []
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        failed = failures(mutant, first=first)
        print(f"{mutant.name}: {len(failed)} failures: {summary(failed) or 'SURVIVES'}", flush=True)
        if not failed:
            survivors.append(mutant.name)
    print(f"survivors: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
