"""Breaks the package on purpose, one line at a time, and demands that the fast suite notices.

    python tests/mutations.py            all faults
    python tests/mutations.py drift      those whose description contains "drift"
    python tests/mutations.py --list     what there is

The tests must pass in a copy of the repository. Then each fault is applied to it, and the tests run
until the first failure. The script fails if a fault survives, or if its text is no longer there.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SOURCES = ["dcpc", "experiments"]
"""Where faults are put."""

TESTS = [
    "tests/test_distributions.py",
    "tests/conquer",
    "tests/recombine",
    "tests/test_presets.py",
    "tests/test_sweep.py",
    "tests/divide",
    "tests/test_what_users_bring.py",
    "tests/test_posterior.py",
    "tests/test_draws.py",
    "tests/test_convergence.py",
    "tests/test_bad_input.py",
    "tests/test_annealing.py",
    "tests/approach",
    "tests/graphs",
    "tests/test_discrete.py",
    "tests/test_summed_out.py",
    "tests/test_minibatches.py",
    "tests/test_inference.py",
    "tests/test_io.py",
    "tests/test_posterior_files.py",
    "tests/test_pickle.py",
    "tests/test_threads.py",
    "tests/test_interruption.py",
    "tests/training/data/test_images.py",
    "tests/training/data/test_hub.py",
    "tests/training/test_callbacks.py",
    "tests/training/modules/test_amortised.py",
    "tests/training/modules/test_warm_start.py",
    "tests/training/modules/test_particle.py",
    "tests/test_devices.py",
    "tests/training/test_divergence.py",
    "tests/training/test_damage.py",
    "tests/training/test_resuming.py",
    "tests/training/test_processes.py",
    "tests/test_configs.py",
    "tests/networks",
    "tests/training/modules/test_classifier.py",
    "tests/evaluation",
    "tests/models",
    "tests/experiments",
]
"""Quick and narrow first: most faults fall within seconds."""


@dataclass(frozen=True)
class Fault:
    """A piece of code, and what to put in its place.

    The piece is found by its tokens, wherever it is: moved and reformatted code stays found.

    Attributes:
        what: What is wrong then.
        old: The piece.
        new: Its replacement.
        within: Name of the class or function around it, where it occurs more than once.
    """

    what: str
    old: str
    new: str
    within: str = ""

    def find(self, root: Path) -> list[tuple[Path, int, int]]:
        """Files below `root` that hold the piece, with its start and end."""
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        pattern = re.compile(r"\s*".join(re.escape(token) for token in tokens))
        found = []
        for path, source in _sources(root):
            found += [
                (path, first + match.start(), first + match.end())
                for first, part in self._parts(source)
                for match in pattern.finditer(part)
            ]
        return found

    def _parts(self, source: str) -> list[tuple[int, str]]:
        """The parts of a file to look at, with their offsets."""
        if not self.within:
            return [(0, source)]
        if self.within not in source:
            return []
        starts = [0, *(match.end() for match in re.finditer("\n", source))]
        return [
            (starts[node.lineno - 1], source[starts[node.lineno - 1] : starts[node.end_lineno]])
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == self.within
        ]


@functools.cache
def _sources(root: Path) -> list[tuple[Path, str]]:
    """The files that faults are put into, as they are without one."""
    paths = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
    return [(path, path.read_text()) for path in paths]


FAULTS = [
    Fault("the drift points down the density",
          "torch.addcmul((2 * eta).sqrt() * noise, eta, metric",
          "torch.addcmul((2 * eta).sqrt() * noise, -eta, metric"),
    Fault("the noise has half the variance", "(2 * eta).sqrt()", "eta.sqrt()", within="Langevin"),
    Fault("backward density without its drift",
          "residual = torch.addcmul(displacement, eta,",
          "residual = torch.addcmul(displacement, 0 * eta,"),
    Fault("later leapfrog steps kick with half the force",
          "displacement = torch.addcmul(displacement, 2 * eta,",
          "displacement = torch.addcmul(displacement, eta,"),
    Fault("normaliser of the proposal without the preconditioner",
          ".log() - metric.half_log_det()", ".log()"),
    Fault("particle variance without 1/K",
          "+ 1.0 / score.shape[0]", "+ 1e-9"),
    Fault("particle variance not scaled to mean one",
          "(precision / precision.mean(-1, keepdim=True)).sqrt()", "precision.sqrt()"),
    Fault("second moment to twice the power",
          ".pow(-0.5 * self.exponent)", ".pow(-1.0 * self.exponent)"),
    Fault("metropolis without log q backward",
          "self.predicted.log_density + back.log_ratio",
          "self.predicted.log_density"),
    Fault("metropolis accepts everything",
          "accepted = torch.rand_like(ratio).log() < ratio\n",
          "accepted = torch.rand_like(ratio).log() < ratio + 100\n", within="Metropolis"),
    Fault("rejected moves still change the log-joint",
          "torch.where(accepted, self.after.log_density - self.before.log_density, 0.0)",
          "self.after.log_density - self.before.log_density"),
    Fault("scores of rejected proposals are handed on",
          "torch.where(accepted.unsqueeze(-1), self.after.score, self.before.score)",
          "self.after.score"),
    Fault("handed-on scores are not those of resampled particles",
          "evaluations = {name: _take(e, info.ancestors) for name, e in evaluations.items()}",
          "pass"),
    Fault("jumps forget where they come from",
          "WayBack((log_here - log_there).unsqueeze(-1))", "WayBack((-log_there).unsqueeze(-1))"),
    Fault("jumps forget where they go",
          "WayBack((log_here - log_there).unsqueeze(-1))", "WayBack(log_here.unsqueeze(-1))"),
    Fault("jumps have the tails of a normal",
          "noise = torch.randn_like(like) * (self.degrees / self._chi_square(like)).sqrt()",
          "noise = torch.randn_like(like)"),
    Fault("components of a jump are equally likely",
          "share = self._log_shares.exp().movedim(0, -1)",
          "share = self._log_shares.softmax(0).mul(0).softmax(0).movedim(0, -1)"),
    Fault("components do not borrow from one another",
          "borrowed = value.shape[-1] / (count + value.shape[-1])",
          "borrowed = 0 / (count + value.shape[-1])"),
    Fault("the number of modes is not penalised",
          "criterion = num_parameters * math.log(num_particles) - 2.0", "criterion = -2.0"),
    Fault("further pilots start without the prior",
          "reference = HalfPrior(reference)", "pass"),
    Fault("moves have one leapfrog step whatever they forget",
          "LENGTHS = (1, 3, 7, 15, 31)", "LENGTHS = (1,)"),
    Fault("resumed runs forget the length of their moves",
          "return problem.with_leapfrog_steps(steps) if is_tuned else problem", "return problem"),
    Fault("children of a reference are drawn from the prior's parents",
          "arguments, num_particles, given)", "arguments, num_particles) | given"),
    Fault("latents with parents start from references too",
          "if unit.parents or name in active", "if name in active"),
    Fault("blocks are of any size",
          "if first is second or sum(sizes[k] for k in first + second) > most:",
          "if first is second:"),
    Fault("operators of different stages run together",
          "return self._kinds.get(node), node.target, key_of(places)",
          "return None, node.target, key_of(places)"),
    Fault("one triangle of a matrix is inverted for both",
          "solves[matrix, is_upper].append", "solves[matrix, True].append"),
    Fault("products with the inverse forget the transpose",
          "transposed if is_transposed else inverse", "inverse"),
    Fault("evaluations stay those of the particles before resampling",
          "taken = [_taken(self._values[node], shape, rows) for node in carried]",
          "taken = [self._values[node] for node in carried]"),
    Fault("rows of a family are taken in any order",
          "if value.index != first.index + step * (end - start):", "if False:"),
    Fault("sums over one element lose their type",
          "if single and source.dtype == like.dtype:", "if single:"),
    Fault("weight forgets the densities' ratio",
          "log_weight=group.over_population(increment)",
          "log_weight=group.over_population(gained)"),
    Fault("weights of accepted moves are not clipped",
          "ratio.clamp(-self.bound, self.bound)", "ratio"),
    Fault("rejected moves change the weight",
          "increment = torch.where(accepted, ratio.clamp(-self.bound, self.bound), 0.0)",
          "increment = ratio.clamp(-self.bound, self.bound)"),
    Fault("few particles that diverge together lengthen their steps",
          "ess / ratio.shape[0] * proposed.mean_acceptance(ratio + self.bound)",
          "ess / ratio.shape[0]"),
    Fault("the paper's local weight without the proposal",
          "density - proposed.proposal.log_density,", "density,"),
    Fault("the paper's weights without the local densities",
          "(weights.log_mean() - kept)", "weights.log_mean().expand_as(kept)"),
    Fault("weights not reset after resampling",
          "log_weight=weights.reset_to_mean(low)", "log_weight=weights"),
    Fault("weights reset to one, which loses the evidence",
          "reset = self.log_mean().expand_as(self.log_weight)",
          "reset = 0 * self.log_mean().expand_as(self.log_weight)"),
    Fault("log-mean without the number of particles",
          "torch.logsumexp(self.log_weight, 0) - math.log(self.num_particles)",
          "torch.logsumexp(self.log_weight, 0)", within="LogWeights"),
    Fault("NaN kept as a log-density",
          "bad = ~(log_density.abs() < math.inf)", "bad = log_density == math.inf"),
    Fault("resampling without the log-joint",
          "replace(taken, log_joint=log_joint, log_weight=weights",
          "replace(taken, log_weight=weights"),
    Fault("resampling of all cells where one is low",
          "ancestors = torch.where(low, parts.resampler(normalized), stay)",
          "ancestors = parts.resampler(normalized)"),
    Fault("the target's change does not reach the weights",
          "state.log_weight.add(log_joint - state.log_joint)",
          "state.log_weight.add(0 * log_joint)"),
    Fault("the loss with the wrong sign",
          "return -(state", "return (state", within="loss"),
    Fault("the loss without the dataset's size",
          "over_population(self._log_factors(batch), scaled=True)",
          "over_population(self._log_factors(batch))"),
    Fault("no Jacobian",
          "log_factor if log_det is None else log_factor + log_det", "log_factor"),
    Fault("Jacobian with the wrong sign",
          "log_factor if log_det is None else log_factor + log_det",
          "log_factor if log_det is None else log_factor - log_det"),
    Fault("scale ignored",
          "else log_prob * scale", "else log_prob"),
    Fault("a unit without one of its children",
          "return sorted({*members} | self.children(members), key=self._order.__getitem__)",
          "return sorted({*members} | self.children(members), key=self._order.__getitem__)[:-1]"
          " or [*members]"),
    Fault("children without the observed sites",
          "for name, latents in self.depends.items(): for latent in latents:",
          "for name, latents in self.depends.items():\n"
          "            for latent in latents if name in self.latents else ():"),
    Fault("blanket without co-parents",
          "(self.parents(members) | children | co_parents)",
          "(self.parents(members) | children)"),
    Fault("all units have one colour",
          "classes.setdefault(colour[index], [])", "classes.setdefault(0, [])"),
    Fault("sequential schedule from the roots down",
          "return [[unit] for unit in reversed(units)]", "return [[unit] for unit in units]"),
    Fault("log-density scaled by the subsample",
          "return reduced if relative == 1.0 else reduced * relative", "return reduced"),
    Fault("plates in the wrong order",
          "return [1 + len(site.batch_shape) + plate.dim for plate in self.plates]",
          "return [1 + len(site.batch_shape) + p.dim for p in reversed(self.plates)]"),
    Fault("detach blocks the score",
          "and node.target is torch.ops.aten.detach.default:", "and node.target is None:"),
    Fault("writes to one index scatter to repeated indices",
          "node.target = _select_scatter", "pass"),
    Fault("shape-only uses count as edges",
          "elif _reads_shape_only(node):", "elif False:"),
    Fault("capture not keyed on non-tensor arguments",
          "tuple(plain_key(leaf) if is_plain(leaf) else type(leaf) for leaf in self._static)",
          "()"),
    Fault("captures of several training modes are one",
          "key = (arguments.key, snapshot.modes)", "key = (arguments.key, ())"),
    Fault("latents' factors are tempered too",
          "else:\n                weighed[name] = value\n",
          "else:\n                weighed[name] = beta * value\n"),
    Fault("likelihood not tempered",
          "value.new_zeros(value.shape) if zero else beta * value", "value"),
    Fault("references keep their weight to the end",
          "weighed[name] = (1.0 - beta) * start + (", "weighed[name] = start + ("),
    Fault("a joint reference keeps its weight to the end",
          "return (1.0 - self.temperature) * log_reference", "return log_reference"),
    Fault("half of an odd number of draws is always the smaller half",
          'int(len(prior) / 2 + float(torch.rand((), device="cpu")))', "int(len(prior) / 2)"),
    Fault("the last pilot's reference is taken whatever it misses",
          "if finds_more(first.annealed, last.annealed):", "if False:"),
    Fault("curvature takes every eigenvalue for what it is",
          "eigenvalues.abs().clamp(min=MIN_CURVATURE)", "eigenvalues.clamp(min=MIN_CURVATURE)"),
    Fault("a cloud's covariance is not weighted",
          "deviation = value - (share.unsqueeze(-1) * value).sum(0)",
          "deviation = value - value.mean(0)"),
    Fault("plates are always independent",
          "return not bool(changed.any())", "return True"),
    Fault("values are not certified",
          "if got.shape != expected.shape or bool(differs(got, expected).any()):",
          "if got.shape != expected.shape:"),
    Fault("dual averaging away from the target",
          'state["centre"] - count.sqrt()', 'state["centre"] + count.sqrt()'),
    Fault("frozen steps use the last value, not the average",
          '"log_step" if adapting else "log_average"', '"log_step" if adapting else "log_step"'),
    Fault("weighted mean without weights",
          "(self._weights(name) * z).sum(0) for", "z.mean(0) for"),
    Fault("the standard error ignores families",
          ".scatter_add_(0, eve, normalized)", ".copy_(normalized)"),
    Fault("the second annealing run goes on adapting",
          "pilot.ladder, adapt=False)", "pilot.ladder, adapt=True)", within="anneal_twice"),
    Fault("a run's second annealing goes on adapting",
          "pilot.ladder, adapt=False", "pilot.ladder, adapt=True", within="_from_prior"),
    Fault("systematic resampling drops the last particle",
          "return _invert_cdf(rows, (slots + uniform) / rows.shape[-1]).movedim(-1, 0)",
          "return (_invert_cdf(rows, (slots + uniform) / rows.shape[-1]).movedim(-1, 0)"
          " % max(1, rows.shape[-1] - 1))"),
    Fault("held-out images are also trained on",
          "return order[num_held_out:], order[:num_held_out]",
          "return order, order[:num_held_out]"),
    Fault("the binary draws of an epoch are those of the first",
          "self.follow(epoch)", "self.follow(0)"),
    Fault("the cap on training images also moves the held-out ones",
          "training, held_out = super().split(num_images)",
          "training, held_out = super().split(self.num_training or num_images)"),
    Fault("the cache forgets the size", "x{self.size or 'original'}", "xoriginal"),
    Fault("the cache forgets the columns", ", *columns]", "]", within="_cached_file"),
    Fault("the cache forgets when files changed", "stat.st_mtime_ns", "0"),
    Fault("levels over 256", "LEVELS = 255", "LEVELS = 256"),
    Fault("all images have the same binary draws", "(0, row, 0, 0)", "(0, 0, 0, 0)"),
    Fault("binary draws ignore the epoch",
          "[self.seed % 2**64, self.epoch]", "[self.seed % 2**64, 0]"),
    Fault("binary draws overlap from image to image", "(0, row, 0, 0)", "(row, 0, 0, 0)"),
    Fault("a failed decoding leaves its file", "place.unlink(missing_ok=True)", "pass"),
    Fault("colours in the order of the file",
          "array.transpose(2, 0, 1)", "array.transpose(2, 0, 1)[::-1]"),
    Fault("pictures in [0, 1] whatever the data's range",
          "image_grid(pictures, columns, pl_module.intensity_range)",
          "image_grid(pictures, columns)"),
    Fault("the monitor counts the optimiser's steps",
          "return trainer.fit_loop.total_batch_idx + 1", "return trainer.global_step"),
    Fault("the encoder does not learn from the particles",
          'return {"guide_loss": problem.guide_loss(state) / len(x)}', "return {}"),
    Fault("lpc keeps its particles",
          "preset.warm_starts_every_visit if start.restart is None",
          "False if start.restart is None"),
    Fault("particles restart from the encoder at every visit",
          "draw() if self.restarts else", "draw() if self.guide is not None else"),
    Fault("the parameters step after the sweeps of a first visit too",
          "not self.automatic_optimization and remaining < self.sweeps_per_step",
          "not self.automatic_optimization"),
    Fault("tied data keep the weights that they had in other batches",
          "value.new_zeros(value.shape[:1])", "value[:, 0]"),
    Fault("an algorithm takes another one's step size",
          "return given.get(algorithm)", "return next(iter(given.values()))"),
    Fault("runs of other layers share a folder",
          "stem for layer in layers)", "stem for layer in layers[:1])"),
    Fault("the autoencoder's loss is that of the whole batch",
          "self.guide, x) / len(x)", "self.guide, x)", within="GenerativeModule"),
    Fault("the learning rate ends at a half",
          "done.append(self._num_steps / total)", "done.append(0.5 * self._num_steps / total)"),
    Fault("every step draws the same numbers",
          "derived_seed(self._seed, *key, *(", "derived_seed(self._seed, *("),
    Fault("processes draw the same numbers",
          "[PROCESS, rank] if rank else []", "[]"),
    Fault("an epoch that is continued begins anew",
          "self.batches.start = self._num_done", "self.batches.start = 0"),
    Fault("data wander from process to process",
          "order[order % self.num_processes == self.rank]",
          "order[torch.arange(self.size) % self.num_processes == self.rank]"),
    Fault("processes adapt each on its own",
          "flat *= weight / num_processes()", "return adaptation"),
    Fault("losses of uneven processes weigh the same",
          "return num_processes() * len(data) / float(total)", "return 1.0"),
    Fault("particles that are not finite are stored",
          "if not _is_finite(state):", "if False:"),
    Fault("checkpoints with numbers that are not finite are written",
          "if entry is not None: raise CheckpointError( f\"'{path}' was not",
          "if False:\n            raise CheckpointError(f\"'{path}' was not"),
    Fault("a changed entry is not noticed",
          "describe_change(checkpoint, written) if written != {} else None", "None"),
    Fault("damaged bytes are not noticed",
          "check_entries(path) except FileError as error: raise CheckpointError(",
          "pass\n    except FileError as error:\n        raise CheckpointError("),
    Fault("a signal while validating waits for the end of validation",
          'if trainer.state.fn == "fit" and self._is_signalled(trainer):', "if False:"),
    Fault("a run that stops within an epoch saves as if it had finished it",
          "if not stops_within_epoch(trainer): self.save(trainer)", "self.save(trainer)"),
    Fault("steps that would spoil the parameters are taken",
          "if not self.watch.usable(self._loss, gradients):", "if False:"),
    Fault("an exploding loss goes unnoticed",
          "if value > usual + FACTOR * (abs(usual) + 1.0):", "if False:"),
    Fault("the shared scale is solved with untransposed",
          "self.scale_tril.mT, rows, upper=True", "self.scale_tril, rows, upper=False"),
    Fault("the Bernoulli's normaliser is left out",
          "value * self.logits - softplus(self.logits, threshold=40.0)", "value * self.logits"),
    Fault("the score carries gradients of parameters",
          'if node.op == "get_attr" and not learns:', 'if node.op == "nothing":'),
    Fault("bounds average log-weights",
          "LogWeights(log_weights).log_mean())", "log_weights.mean(0))"),
    Fault("bounds leave the guide's density out",
          "chunks.append(problem.density.log_joint(state.latents) - state.log_joint)",
          "chunks.append(problem.density.log_joint(state.latents))"),
    Fault("completion sees the hidden pixels",
          "shown = torch.where(visible, x, intensity_range[0])",
          "shown = x"),
    Fault("completion scores the visible pixels",
          "hidden_mse=(squares * hidden).sum(1) / hidden.sum(1)",
          "hidden_mse=squares.mean(1)"),
    Fault("the covariance as its own Cholesky factor",
          "torch.linalg.cholesky(_joined(f.covariances_ for f in fits)).to(dtype)",
          "_joined(f.covariances_ for f in fits).tril().to(dtype)"),
    Fault("all classes share their mixture",
          "chosen = self.labels == label if len(self.labels) else ~chosen",
          "chosen = chosen"),
    Fault("the Frechet distance with half its overlap",
          "cov2.trace() - 2.0 * overlap",
          "cov2.trace() - overlap"),
    Fault("neighbours of later chunks counted from zero",
          "torch.arange(start, start + len(chunk), device=rows.device)",
          "torch.arange(len(chunk), device=rows.device)"),
    Fault("frozen particles averaged without their weights",
          "parts.append(_average(weights[:, rows].to(means), means))",
          "parts.append(means.mean(0))"),
    Fault("intensities from -1 to 1 are not scaled",
          "    return (values - black) / (white - black)",
          "    return values"),
    Fault("resampled particles keep their old evaluations",
          "evaluations = {name: _take(e, info.ancestors) for name, e in evaluations.items()}",
          "pass"),
    Fault("the last batch of particles counts those of the one before again",
          "value[done - start :] for value", "value for value"),
    Fault("the last batch of particles is short",
          "start = min(done, count - size)", "start = done"),
    Fault("the loss keeps the activations of all batches of particles",
          "if recompute:", "if False:", within="in_batches"),
    Fault("prior draws run the whole model",
          "if not self._left:\n            raise", "if False:\n            raise"),
    Fault("weights of a checkpoint in double precision are rounded",
          "if precision == DOUBLE:", "if False:"),
    Fault("the log-joint without the factors that move later",
          "log_joint = log_joint + self.division.in_batches(self._log_rest, latents)",
          "pass"),
    Fault("a Metropolis sweep counts one gradient",
          "parts.move.num_scores + parts.correction.scores_proposal", "parts.move.num_scores"),
    Fault("the paper's correction counts a score that it does not take",
          "needs_density: ClassVar[bool] = True\n    scores_proposal: ClassVar[bool] = False",
          "needs_density: ClassVar[bool] = True\n    scores_proposal: ClassVar[bool] = True"),
    Fault("a momentum stays as it was where its step is rejected",
          'memory_if_rejected={"momentum": -momentum}',
          'memory_if_rejected={"momentum": momentum}'),
    Fault("a momentum is refreshed too much",
          "alpha=(1.0 - self.persistence**2) ** 0.5", "alpha=1.0"),
    Fault("a momentum misses its last half kick",
          "end = torch.addcmul(middle, 0.5 * eps,", "end = torch.addcmul(middle, 0.0 * eps,"),
    Fault("what a move keeps is not resampled",
          "kind: {name: change(name, value) for name, value in by_latent.items()}",
          "kind: by_latent"),
    Fault("what a move keeps is that of taken proposals everywhere",
          "torch.where(accepted.unsqueeze(-1), value, self.memory_if_rejected[name])", "value"),
    Fault("what a move keeps is not stored",
          "values |= {(name, kind): value for name, value in by_latent.items()}", "pass"),
    Fault("Barker noise ignores the score on the way back",
          "logsigmoid(-step * metric.whiten_score(score)).sum(-1) - forward",
          "torch.zeros_like(forward)"),
    Fault("Barker noise keeps all its signs",
          "torch.where(keeps, noise, -noise)", "noise"),
    Fault("Barker's density is that of its noise",
          "way_back, normal + forward - constant", "way_back, normal - constant"),
    Fault("several leapfrog steps have one length",
          "factor = 1.0 + self._range", "factor = 1.0 + 0.0"),
    Fault("bad scores are zero at one end of a move only",
          "return self.usable(self.evaluate_raw(value))", "return self.evaluate_raw(value)"),
    Fault("held-out data are moved by single steps",
          "LEAPFROG_STEPS = 4", "LEAPFROG_STEPS = 1"),
    Fault("a batch's evidence is given to each of its data whole",
          "(log_evidence / len(x)).expand", "log_evidence.expand"),
    Fault("training stops when the first budget is spent",
          "trainer.should_stop = len(self.kept) == len(self.sizes)",
          "trainer.should_stop = bool(self.kept)"),
    Fault("leapfrog steps count one gradient",
          "parts.move.num_scores + parts", "1 + parts"),
    Fault("the table by gradients shows what was learned by time",
          'run["spent"][budget] for run', 'run["spent"]["seconds"] for run'),
    Fault("a warm guide goes on learning from single particles",
          "if has_guide and not start.warm_up_epochs:", "if has_guide:"),
    Fault("the bound of a warm guide teaches the model",
          "{name: value.detach() for", "{name: value for", within="_by_its_bound"),
    Fault("errors do not pull at the value before",
          "prediction = stage.predict(before.value)",
          "prediction = stage.predict(before.value.detach())"),
    Fault("the input's drive outlives a step of the weights",
          "if drive is None or phase.weights:", "if drive is None:"),
    Fault("the input's drive is constant though the input moves",
          "phase.weights or network.free_nodes([0])", "phase.weights"),
    Fault("weights descend the sum over the samples",
          "None if gradient is None else gradient / len(energy)", "gradient"),
    Fault("values descend the mean over the samples",
          "torch.autograd.grad(energy.sum(), [", "torch.autograd.grad(energy.mean(), ["),
    Fault("a clamped value moves",
          "not (self.is_clamped or self.is_frozen)", "not self.is_frozen"),
    Fault("a frozen value moves",
          "not (self.is_clamped or self.is_frozen)", "not self.is_clamped"),
    Fault("values are saved with the weights",
          'destination.pop(f"{prefix}value", None)', "pass"),
    Fault("a shared variance is counted once for all units",
          "0.5 * self.logvar.expand(value.shape[1:]).sum()", "0.5 * self.logvar.sum()"),
    Fault("the precision-weighted error is whitened once",
          "self.whiten_transposed(self.whiten(value - prediction))",
          "self.whiten(value - prediction)"),
    Fault("Z-IL with the inference's own step size",
          "UNIT_STEP = sgd(1.0)", "UNIT_STEP = sgd(0.5)"),
    Fault("incremental learning counts from its first step",
          "(step - self.first) % self.every == 0", "step % self.every == 0"),
    Fault("a second nudge starts where the first one ended",
          "node.init(value)", "pass"),
    Fault("symmetric nudging divides by beta",
          "(nudged - other) / (self.beta - start)", "(nudged - other) / self.beta"),
    Fault("targets broadcast against the output",
          "if y.shape != output.shape:", "if False:"),
    Fault("a value optimiser may mix samples",
          "if not torch.equal(*moved):", "if False:"),
    Fault("an energy counts as finite if its entries are",
          "bad = bad or [max(means, key=lambda name: abs(means[name]))]", "pass"),
    Fault("a change that is no number is the end of a relaxation",
          "if not math.isfinite(change):", "if False:"),
    Fault("the Hopfield energy has no half",
          "0.5 * node.value.square().sum(1)", "node.value.square().sum(1)"),
    Fault("what one side declares is the other's by default",
          "elif name in others:", "elif False:"),
    Fault("weights of another network are loaded as far as they fit",
          "if misfit is not None:", "if False:", within="load_weights"),
    Fault("an in-place layer overwrites its input",
          "activations.append(module(activations[-1].clone()))",
          "activations.append(module(activations[-1]))"),
    Fault("a variance scales the error as a standard deviation",
          "(-0.5 * self.logvar).exp()", "(-self.logvar).exp()"),
    Fault("the nudge has unit strength",
          'parts["cost"] = strength * cost', 'parts["cost"] = cost'),
    Fault("strict beliefs ignore init",
          "beliefs[1:-1] = _initial_beliefs(init, activations)",
          "_initial_beliefs(init, activations)"),
    Fault("strict errors are an update old",
          "errors = _errors(passes, beliefs, loss_fn, y)\n        _require_finite(errors, step)",
          "_require_finite(errors, step)"),
    Fault("dropout is drawn anew at every evaluation",
          "_set_random_state(self._noise, leaf)", "pass"),
    Fault("batch statistics are counted at every evaluation",
          "buffer.clone() for name, buffer", "buffer for name, buffer"),
    Fault("gradients of before take part in the first step",
          "        optimizer.zero_grad()\n        return self._learn",
          "        return self._learn"),
    Fault("a layer that occurs twice is evaluated once",
          "for index, module in enumerate(self.layers)",
          "for index, module in self.layers.named_children()"),
    Fault("a relaxation needs gradients to be allowed",
          "@torch.enable_grad()\ndef move", "def move"),
    Fault("predictions are made with dropout",
          "self.network.eval()", "pass"),
    Fault("a shared layer keeps its last gradient",
          "gradients.get(parameter, 0) + gradient", "gradient"),
    Fault("elements in the order of axes instead of plates",
          "return factor.permute(0, *(1 + order.index(axis) for axis in axes))", "return factor"),
    Fault("a scaled Jacobian",
          "log_factor if log_det is None else log_factor + log_det",
          "log_prob if log_det is None else _rescaled(log_prob + log_det, msg['scale'], 1.0)"),
    Fault("a subsample's scale is left in its factors",
          "scale = scale / by_plates\n", "scale = scale / 1.0\n"),
    Fault("what is masked out is evaluated where it is",
          'return torch.where(chosen, msg["value"], feasible_value(msg["fn"], msg["value"]))',
          'return msg["value"]'),
    Fault("masks of handlers are not applied",
          "return torch.where(mask, log_prob, log_prob.new_zeros(()))", "return log_prob"),
    Fault("masks inside of distributions are not looked at",
          "yield part._mask, part.event_dim", "pass"),
    Fault("bad entries behind a mask hide those beside it",
          "num_nan = int((value.isnan() & mask).sum())",
          "num_nan = int(mask.all() * value.isnan().sum())"),
    Fault("masked elements that others look at stay",
          "active[name] = _like_value(mask | needed, site)",
          "active[name] = _like_value(mask, site)"),
    Fault("a masked prior in use is not flat", "flat.add(name)", "pass"),
    Fault("masked elements are moved",
          "proposal = replace(proposal, value=torch.where(unit.active, proposal.value, value))",
          "pass"),
    Fault("masked elements count in the preconditioner",
          "score = score / share.clamp(min=1e-12).sqrt()", "pass"),
    Fault("a reference's score at masked elements counts",
          "score = torch.where(self.active, score, 0.0)", "pass"),
    Fault("masked elements count as accepted",
          "if active is None:\n            return acceptance",
          "if True:\n            return acceptance"),
    Fault("scores that are bad go uncounted",
          "bad = ~(self.score.abs() < math.inf).all(-1) & (self.log_density.abs() < math.inf)",
          "bad = ~(self.log_density.abs() < math.inf)"),
    Fault("one and True are one argument",
          "return type(value), value\n", "return value\n"),
    Fault("globals of a model are not watched",
          "self._visit_global(function.__globals__[name], _names(function.__code__))", "pass"),
    Fault("closures of a model are not watched",
          "self._visit(cell.cell_contents)", "cell.cell_contents"),
    Fault("attributes of classes are not watched",
          "self._visit_class(type(module))", "pass"),
    Fault("buffers are not watched", '("_parameters", "_buffers")', '("_parameters",)'),
    Fault("a capture of objects is not compared with a plain run",
          "unsure = thorough or not snapshot.is_complete", "unsure = False"),
    Fault("a capture that read its data serves other data",
          "unsure = unsure or data != self.data", "pass"),
    Fault("numbers taken from data go unnoticed",
          "self.reads.found = True\n            with disable", "with disable"),
    Fault("global and local latents of a subsample are moved",
          "if scaled and len({site.scale for site in sites.values()}) > 1:", "if False:"),
    Fault("a rescaled prior has an evidence",
          "or (sites[name].is_rescaled and activity.has_active(name))", ""),
    Fault("changes of the joint are not certified",
          "wrong = comparable & ~((got - change).abs() <= allowed)",
          "wrong = comparable & ~((got - change).abs() <= 1e9 * allowed)"),
    Fault("changes in double precision may be off by as much as rounding in single precision",
          "allowed = 1e-7 * (1.0 + expected.size.nan_to_num()) + 10.0 * rounding",
          "allowed = 1e-4 * (1.0 + expected.size.nan_to_num()) + 10.0 * rounding"),
    Fault("numbers that a precision rounds are a disagreement",
          "allowed = 1e-7 * (1.0 + expected.size.nan_to_num()) + 10.0 * rounding",
          "allowed = 1e-9 * (1.0 + expected.size.nan_to_num())"),
    Fault("a copy is written to in double precision",
          "if writes and args and isinstance(args[0], Tensor)", "if False and args"),
    Fault("binding never looks at the data anew", "if not self._is_checked:", "if False:"),
    Fault("points of a guide have an evidence",
          "if got == needed:", "if True:"),
    Fault("particles at a mode never move",
          "moment = torch.where(moment > 0, moment, 1.0)", "pass"),
    Fault("scores are not certified",
          "_compare_scores(group, base, reference)\n", "pass\n"),
    Fault("a NaN score at a finite density passes",
          "bad = density.isfinite().unsqueeze(-1) & ~score.isfinite()",
          "bad = density.isfinite().unsqueeze(-1) & (score != score) & False"),
    Fault("a Beta's upper edge is flat",
          "(b - 1) * logsigmoid(-u) - log_beta",
          "(b - 1) * logsigmoid(-u.clamp(max=16.6)) - log_beta"),
    Fault("small gamma shapes are not boosted",
          "return torch._standard_gamma(shape + 1).log() - exponential_variate(shape) / shape",
          "return torch._standard_gamma(shape).log()"),
    Fault("angles leave the circle",
          "return torch.where(x.abs() <= math.pi, x, wrapped)", "return x"),
    Fault("initial values outside of the support are taken",
          "if not bool(support.check(tensor).all()):", "if False:"),
    Fault("an evidence of few families has an error",
          "return error.masked_fill(too_few, math.inf)", "return error"),
    Fault("one sweep per rung, however correlated the particles",
          "while num_sweeps < rung.num_sweeps:", "while num_sweeps < 1:"),
    Fault("every sweep of a rung reweights",
          "retargets=num_sweeps == 0", "retargets=True"),
    Fault("families are counted without their resampling",
          "eve=take_particles(self.eve, ancestors, axes)", "eve=self.eve"),
    Fault("R-hat may be anything", "MAX_R_HAT = 1.01", "MAX_R_HAT = 9.0"),
    Fault("few draws are enough", "MIN_ESS = 400.0", "MIN_ESS = 4.0"),
    Fault("lineages may stay where they were",
          "if least < FORGOTTEN:", "if least < 0.0:"),
    Fault("a guide may miss what the prior finds",
          "return bool((lower > upper).any())", "return False"),
    Fault("data outside of a random support are refused",
          '_bounds(support) == _bounds(nodes[name]["fn"].support) for nodes in again()', "[True]"),
    Fault("a discrete draw without noise",
          "table = table + gumbel_like(table)", "pass", "_choose"),
    Fault("a block is drawn without noise",
          "table = table + gumbel_like(table)", "pass",
          "_backward"),
    Fault("windows begin at the present value",
          "offset = torch.randint(WINDOW, value.shape[:-1], device=value.device)",
          "offset = torch.zeros(value.shape[:-1], device=value.device, dtype=torch.long)"),
    Fault("windows leave the support",
          "table = table.masked_fill(~candidates.feasible, -math.inf)", "pass"),
    Fault("components after the first stay", "start += support.width", "pass", "lines_of"),
    Fault("counts beyond an element's own bound have a probability",
          "extra = torch.where(inside, 0.0, -math.inf)",
          "extra = torch.where(inside, 0.0, 0.0)"),
    Fault("a discrete draw leaves the log-joint as it was",
          "log_joint=unit.group.over_population(gained) if self.is_exact else None",
          "log_joint=None"),
    Fault("probabilities do not weigh particles",
          "* probability).sum(0)", "* 0 + probability / len(mass)).sum(0)"),
    Fault("a plate's discrete elements are redrawn once",
          "NUM_DISCRETE_REDRAWS if any(", "1 if any("),
    Fault("masked-out discrete values move",
          "drawn if unit.active is None else torch.where(unit.active, drawn, value)", "drawn"),
    Fault("a sum takes values twice",
          "for name in part.block.plan.scopes}\n            result",
          "for name in part.block.plan.scopes}\n            count += 1\n            result"),
    Fault("what was summed out is drawn from the example",
          "everything |= group.unpack(drawn.value)", "pass"),
    Fault("steps on noisy scores inject all of the noise",
          "(due - step_size.squeeze(-1).square() * values)", "(due + 0 * values)"),
    Fault("latents of single data are not kept",
          "self._kept[name].index_copy_(axis, minibatch.index, state.latents[name])", "pass"),
    Fault("two threads infer at once",
          "if not _TURN.lock.acquire(blocking=False):", "if _TURN.lock is None:", "exclusive"),
    Fault("a forked process waits for a thread of its parent",
          "self.lock, self.calls = threading.RLock(), []", "pass"),
    Fault("captures are pickled", '{**vars(self), "_captured": OrderedDict()}', "vars(self)"),
    Fault("a file that failed stays", "path.unlink(missing_ok=True)", "pass", "_replacing"),
    Fault("files of live processes are removed",
          "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "remove_stale"),
    Fault("files are written without a lock", "fcntl.flock(file, fcntl.LOCK_EX)", "pass"),
    Fault("damaged entries are read", "if damaged is not None:", "if False:"),
    Fault("NaN in a file is read", "if count != counts.get(entry):", "if False:"),
    Fault("parts of tensors are saved with the whole of them",
          "if tensor.untyped_storage().nbytes() == tensor.nbytes:", "if True:"),
    Fault("an interrupt stops nothing",
          "while recorder.num_left and not interruption.is_requested:",
          "while recorder.num_left:"),
    Fault("a second interrupt is only noted",
          "if self.is_requested: signal.default_int_handler(number, frame)", "pass"),
    Fault("the handler of interrupts stays",
          "signal.signal(signal.SIGINT, self._previous)", "pass"),
    Fault("a resumed run draws other numbers", 'torch.set_rng_state(state["cpu"].cpu())', "pass"),
    Fault("a resumed run counts its moves anew",
          "recorder._sums = told.sums.copy()", "recorder._sums = SweepSums()"),
    Fault("sums of a partial posterior go on growing",
          "recorder._sums = told.sums.copy()", "recorder._sums = told.sums"),
    Fault("other data resume a run",
          "if before.shape != log_joint.shape or not torch.allclose(",
          "if before.shape != log_joint.shape and not torch.allclose("),
    Fault("resampled particles take what was computed of other cells",
          "ancestors.reshape(-1, num_cells) * num_cells + cells).flatten()",
          "ancestors.reshape(-1, num_cells) + cells * len(ancestors)).flatten()", within="take"),
    Fault("a first sweep that learns is compiled for itself",
          "is_first = self._learns_now and not names <= state.adaptation.keys()",
          "is_first = False"),
    Fault("compiling reckons with one sweep per visit",
          "most = min(bounds, default=0) * self.sweeps_per_step", "most = min(bounds, default=0)"),
    Fault("a batch that is left over counts as a whole one",
          "size: most * count // len(batches)", "size: most"),
    Fault("a write below a view is recorded",
          "return all(x.untyped_storage().data_ptr() != memory for x in others)", "return True"),
    Fault("a write that keeps the type is recorded as one that does not",
          "if plain(*args, **kwargs).dtype != target.dtype:", "if False:"),
    Fault("correlations are looked up on the default device",
          'torch.tensor(sizes, device="cpu")', "torch.tensor(sizes)"),
]  # fmt: skip


def failure(workdir: Path, tests: Sequence[str]) -> str | None:
    """The end of pytest's output, if a test fails in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {**os.environ, "PYTHONPATH": str(workdir)}
    result = subprocess.run(
        [*command, *tests], cwd=workdir, env=environment, capture_output=True, text=True
    )
    return None if result.returncode == 0 else result.stdout[-1600:] + result.stderr[-800:]


def survives(fault: Fault, workdir: Path) -> str | None:
    """Runs the suite on the broken copy; a reason if the fault is not noticed."""
    found = fault.find(workdir)
    if len(found) != 1:
        return f"found {len(found)} times"
    path, start, end = found[0]
    source = path.read_text()
    path.write_text(source[:start] + fault.new + source[end:])
    try:
        output = failure(workdir, _nearest_first(path.relative_to(workdir)))
        if output is None:
            return "all tests passed"
        failures = re.findall(r"^FAILED (\S+)", output, re.MULTILINE)
        if not failures:
            return f"pytest itself failed:\n{output}"
        print(f"    noticed by {failures[0]}")
        return None
    finally:
        path.write_text(source)


def _nearest_first(path: Path) -> list[str]:
    """The tests, those that mirror a source file first: a fault should be noticed there."""
    mirror = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    tests = [str(mirror)] if (ROOT / mirror).exists() else []
    folder = path.with_suffix("").parts[1]
    return tests + sorted(TESTS, key=lambda test: folder not in test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("select", nargs="?", default="")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.select in fault.what]
    if options.list:
        print("\n".join(fault.what for fault in chosen))
        return
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info", "build")
        shutil.copytree(ROOT, workdir, ignore=ignored, dirs_exist_ok=True)
        print("no fault", flush=True)
        if (output := failure(workdir, TESTS)) is not None:
            sys.exit(f"the tests fail without any fault:\n{output}")
        for fault in chosen:
            start = time.monotonic()
            print(fault.what, flush=True)
            reason = survives(fault, workdir)
            if reason:
                survivors.append(fault.what)
                print(f"    SURVIVED: {reason}")
            print(f"    {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
