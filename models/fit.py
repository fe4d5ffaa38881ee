"""The trainer of learned passes: a student learns to give what its teacher, the original graph, gives.

Two stages. In the first every block learns by itself, on the inputs that it has in the teacher; the blocks share
nothing, so all learn at once. If the outputs on held-out samples are then further from the teacher's than before, only
what brings them nearer is kept, block by block. In the second the student runs as a whole and learns to give the
teacher's outputs, with a smaller part for what its blocks give. Between them, where the pass asks for it, the sites are
found whose replacement hurts the outputs most, and they stay what they were.

AdamW with a warm-up and a cosine schedule. A tenth of the samples is held out: it decides when to stop and which
weights are kept. A checkpoint beside the output lets an interrupted run go on as if nothing had happened.
Importing this file imports torch.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; Hinton et al., "Distilling
the Knowledge in a Neural Network", arXiv 1503.02531; Romero et al., "FitNets", arXiv 1412.6550 (matching inside).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from graphwright.passes.base import Block, Loss, PassContext, TrainingJob, Weights
from graphwright.passes.errors import InputError, PassError
from graphwright.passes.quality import cosine_drop, held_out, outputs_that_count, rows_that_count
from torch import Tensor

from .fit_undo import Arrays, helpful, mixed
from .progress import bar, minutes
from .torch_graph import TorchGraph, array_of

LARGEST_NORM = 1.0  # of all gradients together; larger ones are scaled down
WARM_UP = 0.05  # share of the steps in which the rate grows from 0
LOWEST = 0.05  # share of the rate at the end of the cosine
DECAY = 0.01
BLOCK_RATE = 5.0  # blocks take so many times the rate of the whole model
BLOCK_SHARE = 0.1  # of the loss of the whole model is for what its blocks give
EVALUATIONS = 20  # of a stage
CLOSEST = 10  # steps from one evaluation to the next, at least
PATIENCE = 5  # evaluations without a better one, then a stage ends
EARLIEST = 0.3  # share of the steps before which no evaluation counts against it
MOST_HELD_OUT = 256  # samples that an evaluation runs
MOST_BROKEN = 10  # steps in a row whose gradient is not finite
SAID_EVERY = 2.0  # seconds between two lines of progress
WIDE = 1000  # an output with so many columns is taken for logits

log = logging.getLogger("graphwright")

Feeds = dict[str, Tensor]


def train(job: TrainingJob, ctx: PassContext) -> Weights:
    """Fit the student to its teacher on the calibration inputs. Raises PassError when it cannot learn."""
    return _Trainer(job, ctx, _Data.of(job.teacher, ctx), ctx.output.with_name(f"{ctx.output.name}.fit")).run()


# --- samples


@dataclass(frozen=True)
class _Data:
    """Samples of one shape can be one batch when the model's first axis is a free batch in every input."""

    samples: Mapping[str, Sequence[np.ndarray]]
    joined: bool
    learned: tuple[int, ...]  # indices of the samples that are learned from
    judged: tuple[int, ...]  # and of those that it is judged by

    @classmethod
    def of(cls, model: ir.Model, ctx: PassContext) -> _Data:
        samples = ctx.calibration or {}
        counts = {len(arrays) for arrays in samples.values()}
        if len(counts) != 1 or 0 in counts:
            raise InputError("--calibration holds no samples, or another number of each input")
        (count,) = counts
        for name, arrays in samples.items():
            if broken := [i for i, a in enumerate(arrays) if a.dtype.kind == "f" and np.isnan(a).any()]:
                raise InputError(f"--calibration: input {name!r} has NaN in sample {broken[0]}; leave such samples out")
        judged = held_out(count)
        learned = [i for i in range(count) if i not in set(judged)]
        inputs = [value for value in model.graph.inputs if value.name in samples]
        firsts = {str(v.shape[0]) if v.shape is not None and len(v.shape) else "1" for v in inputs}
        free = all(v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int) for v in inputs)
        # Without enough samples to hold some out, the fit is judged by what it has seen.
        judged = judged or learned
        return cls(samples, free and len(firsts) == 1, tuple(learned), tuple(judged[:MOST_HELD_OUT]))

    def groups(self, indices: Sequence[int], size: int) -> list[list[int]]:
        """The samples in groups of at most `size` that have equal shapes, in the order given."""
        waiting: dict[tuple[Any, ...], list[int]] = {}
        found = []
        for i in indices:
            shapes = tuple(arrays[i].shape for arrays in self.samples.values())
            group = waiting.setdefault(shapes, [])
            group.append(i)
            if len(group) == size:
                found.append(waiting.pop(shapes))
        return [*found, *waiting.values()]

    def epoch(self, number: int, size: int, seed: int) -> list[list[int]]:
        """The batches of one pass over what is learned from. They follow from seed and number alone."""
        order = np.random.default_rng((seed, number)).permutation(len(self.learned))
        groups = self.groups([self.learned[i] for i in order], size)
        return [groups[i] for i in np.random.default_rng((seed, number, 1)).permutation(len(groups))]

    def feeds(self, group: Sequence[int]) -> list[Feeds]:
        """A group as one batch, or where batches cannot be joined as several."""
        if self.joined:
            arrays = {name: np.concatenate([a[i] for i in group]) for name, a in self.samples.items()}
            return [{name: torch.from_numpy(array) for name, array in arrays.items()}]
        return [{name: torch.from_numpy(np.array(a[i])) for name, a in self.samples.items()} for i in group]


# --- losses


def relative_mse(found: Tensor, wanted: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean squared error over the variance of what is wanted."""
    a, b = found.float(), wanted.float()
    if rows is not None:
        a, b = a[rows], b[rows]
    return ((a - b) ** 2).mean() / b.var(unbiased=False).clamp(min=1e-12)


def cosine_distance(found: Tensor, wanted: Tensor, rows: Tensor | None = None) -> Tensor:
    a, b = found.float(), wanted.float()
    if rows is not None:
        a, b = a[rows], b[rows]
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).mean()


def divergence(found: Tensor, wanted: Tensor, rows: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the rows' softmax from the teacher's."""
    a, b = (torch.log_softmax(x.float(), -1) for x in (found, wanted))
    each = (b.exp() * (b - a)).sum(-1)
    return each.mean() if rows is None else each[rows].mean()


LOSSES: dict[Loss, Callable[..., Tensor]] = {
    Loss.COSINE: cosine_distance,
    Loss.KL: divergence,
    Loss.MSE: relative_mse,
}


def loss_for(name: str, wanted: Tensor) -> Loss:
    """What AUTO means: rows of length 1 are embeddings, many columns are logits."""
    norms = torch.linalg.vector_norm(wanted.float(), dim=-1) if wanted.dim() else torch.zeros(1)
    if wanted.dim() >= 2 and wanted.shape[-1] > 1 and bool(((norms - 1).abs() < 1e-3).all()):
        return Loss.COSINE
    if wanted.dim() >= 2 and ("logits" in name.lower() or wanted.shape[-1] >= WIDE):
        return Loss.KL
    return Loss.MSE


def _rows(feeds: Feeds, shape: Sequence[int]) -> Tensor | None:
    rows = rows_that_count({name: tensor.numpy() for name, tensor in feeds.items()}, tuple(shape))
    return None if rows is None else torch.from_numpy(rows)


# --- the run


@dataclass
class _Stage:
    """Where one stage is: everything that a checkpoint holds of it."""

    name: str
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    step: int = 0
    best_loss: float = math.inf
    first_loss: float = math.inf
    worse: int = 0
    over: bool = False
    optimizer: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        return {
            "name": self.name, "weights": {k: v.detach().clone() for k, v in self.weights.items()}, "best": self.best,
            "step": self.step, "best_loss": self.best_loss, "first_loss": self.first_loss, "worse": self.worse,
            "over": self.over, "optimizer": self.optimizer,
        }  # fmt: skip


@dataclass
class _Trainer:
    job: TrainingJob
    ctx: PassContext
    data: _Data
    checkpoint: Path

    def __post_init__(self) -> None:
        self.teacher = TorchGraph(self.job.teacher)
        self.outputs = self._outputs()
        self.losses: dict[str, Loss] = {}
        self.said = 0.0
        self.start, self.spent = time.perf_counter(), 0.0
        self.done: dict[str, dict[str, Any]] = {}
        self.print = self._fingerprint()

    def run(self) -> Weights:
        job = self.job
        self._resume()
        blocks = job.blocks
        whole = self._student([b.site for b in blocks])
        at_first = self._parameters([name for b in blocks for name in b.weights])
        stats: dict[str, int | float | str] = {"samples": len(self.data.learned), "held_out": len(self.data.judged)}
        stats["drop_before"] = before = self._drop(whole, at_first)
        first = self._blocks(whole, at_first)
        learned = first.best
        stats["drop_after_blocks"] = after = self._drop(whole, learned)
        if not after <= before:
            stats["drop_of_the_helpful"], learned = self._helped(whole, at_first, learned, before)
        sites = self._chosen(learned)
        chosen = [b for b in blocks if b.site in sites]
        student = whole if len(chosen) == len(blocks) else self._student(sites)
        names = [name for b in chosen for name in b.weights]
        weights = {name: learned[name] for name in names}
        if len(chosen) < len(blocks):
            stats["drop_of_the_chosen"] = self._drop(student, weights)
        if job.steps and chosen:
            second = self._whole(student, {**self._parameters(list(job.weights)), **weights})
            weights = second.best
            stats["steps"] = second.step
        stats["block_steps"] = first.step
        stats["drop"] = self._drop(student, weights)
        stats["seconds"] = round(self._seconds(), 1)
        self.checkpoint.unlink(missing_ok=True)
        arrays = {name: array_of(tensor, self.teacher.shared[name].dtype) for name, tensor in weights.items()}
        return Weights(arrays, tuple(b.site for b in chosen), job.record, stats)

    # -- what is trained

    def _student(self, sites: Sequence[str]) -> TorchGraph:
        return TorchGraph(self.job.student(sites), self.teacher.shared)

    def _parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.teacher.shared[name].detach().float().clone() for name in dict.fromkeys(names)}

    def _outputs(self) -> tuple[str, ...]:
        found = outputs_that_count(self.job.teacher, self.job.outputs)
        if not found:
            raise PassError("the model has no output of floats to learn from")
        return found

    def _given(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as the graph takes them: in its own types."""
        return {name: tensor.to(self.teacher.shared[name].dtype) for name, tensor in weights.items()}

    # -- losses of a batch

    def _block_losses(self, student: TorchGraph, weights: Mapping[str, Tensor], feeds: Feeds) -> list[Tensor]:
        """What each block's output is off by, on the teacher's inputs."""
        blocks = self.job.blocks
        wanted = list(dict.fromkeys(name for b in blocks for name in (*b.inputs, b.output)))
        with torch.no_grad():
            values = self.teacher.run(feeds, wanted)
        given = self._given(weights)
        losses = []
        for block in blocks:
            inner = {**feeds, **{name: values[name] for name in block.inputs}}
            found = student.run(inner, [block.output], given)[block.output]
            losses.append(relative_mse(found, values[block.output], _rows(feeds, found.shape)))
        return losses

    def _output_loss(
        self, student: TorchGraph, weights: Mapping[str, Tensor], feeds: Feeds, blocks: Sequence[Block] = ()
    ) -> Tensor:
        """What the outputs are off by; with blocks, also what these give in the student, at a smaller part."""
        inside = [b.output for b in blocks]
        with torch.no_grad():
            wanted = self.teacher.run(feeds, [*self.outputs, *inside])
        found = student.run(feeds, [*self.outputs, *inside], self._given(weights))
        terms = []
        for name in self.outputs:
            if name not in self.losses:
                auto = self.job.loss is Loss.AUTO
                self.losses[name] = loss_for(name, wanted[name]) if auto else self.job.loss
            terms.append(LOSSES[self.losses[name]](found[name], wanted[name], _rows(feeds, wanted[name].shape)))
        total = torch.stack(terms).sum()
        if inside:
            parts = [relative_mse(found[name], wanted[name], _rows(feeds, wanted[name].shape)) for name in inside]
            total = total + BLOCK_SHARE * torch.stack(parts).mean()
        return total

    def _judge(self, loss: Callable[[Feeds], Tensor]) -> float:
        """The mean loss over what is held out."""
        total, count = 0.0, 0
        with torch.no_grad():
            for group in self.data.groups(self.data.judged, self.job.batch):
                for feeds in self.data.feeds(group):
                    share = len(group) if self.data.joined else 1
                    total += float(loss(feeds)) * share
                    count += share
        return total / max(count, 1)

    def _drop(self, student: TorchGraph, weights: Mapping[str, Tensor]) -> float:
        """1 - the mean cosine of the outputs' rows with the teacher's, of the output where that is greatest."""
        drops: dict[str, list[tuple[float, int]]] = {name: [] for name in self.outputs}
        with torch.no_grad():
            for group in self.data.groups(self.data.judged, self.job.batch):
                for feeds in self.data.feeds(group):
                    wanted = self.teacher.run(feeds, self.outputs)
                    found = student.run(feeds, self.outputs, self._given(weights))
                    for name in self.outputs:
                        a, b = (x[name].float().numpy() for x in (wanted, found))
                        rows = _rows(feeds, a.shape)
                        drop = cosine_drop(a, b, None if rows is None else rows.numpy())
                        drops[name].append((drop, len(group)))
        return max(sum(d * n for d, n in each) / sum(n for _, n in each) for each in drops.values())

    # -- stages

    def _blocks(self, student: TorchGraph, weights: dict[str, Tensor]) -> _Stage:
        def loss(current: dict[str, Tensor], feeds: Feeds) -> Tensor:
            return torch.stack(self._block_losses(student, current, feeds)).sum()

        return self._stage("blocks", weights, self.job.block_steps, BLOCK_RATE * self.job.rate, loss, loss)

    def _whole(self, student: TorchGraph, weights: dict[str, Tensor]) -> _Stage:
        def loss(current: dict[str, Tensor], feeds: Feeds) -> Tensor:
            return self._output_loss(student, current, feeds, self.job.blocks)

        def judged(current: dict[str, Tensor], feeds: Feeds) -> Tensor:
            return self._output_loss(student, current, feeds)

        return self._stage("whole model", weights, self.job.steps, self.job.rate, loss, judged)

    def _helped(self, student: TorchGraph, at_first: Arrays, learned: Arrays, before: float) -> tuple[float, Arrays]:
        """The drop and the weights with what blocks have learned that brings the outputs nearer."""
        if "helpful" not in self.done:
            self.done["helpful"] = helpful(
                self.job.blocks, at_first, learned, before, lambda weights: self._drop(student, weights), self._say
            )
        return self.done["helpful"]["drop"], mixed(self.job.blocks, at_first, learned, self.done["helpful"]["sites"])

    def _chosen(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The sites that are replaced: without the `keep` whose replacement alone hurts the outputs most."""
        sites = [b.site for b in self.job.blocks]
        if not self.job.keep:
            return sites
        if "sites" in self.done:
            return list(self.done["sites"]["chosen"])
        damage = {}
        for block in self.job.blocks:
            self._say(f"damage of {block.site}")
            alone = self._student([block.site])
            own = {name: weights[name] for name in block.weights}
            damage[block.site] = self._judge(lambda feeds, s=alone, w=own: self._output_loss(s, w, feeds))  # type: ignore[misc]  # bound now
            log.info("replacing %s alone costs %.5f", block.site, damage[block.site])
        kept = set(sorted(sites, key=lambda site: -damage[site])[: self.job.keep])
        chosen = [site for site in sites if site not in kept]
        self.done["sites"] = {"chosen": chosen}
        return chosen

    def _stage(
        self, name: str, weights: dict[str, Tensor], steps: int, rate: float,
        loss: Callable[[dict[str, Tensor], Feeds], Tensor], judged: Callable[[dict[str, Tensor], Feeds], Tensor],
    ) -> _Stage:  # fmt: skip
        """Train `weights`; the stage's `best` are those with the smallest held-out loss."""
        stage = self._restored(name, weights)
        if stage.over or not weights:
            return stage
        current = {key: tensor.detach().clone().requires_grad_() for key, tensor in stage.weights.items()}
        stage.weights = current
        optimizer = torch.optim.AdamW(list(current.values()), lr=rate, weight_decay=DECAY, eps=self.job.epsilon)
        if stage.optimizer:
            optimizer.load_state_dict(stage.optimizer)
        every = max(CLOSEST, steps // EVALUATIONS)
        epoch, batches = -1, list[list[int]]()
        per_epoch = len(self.data.epoch(0, self.job.batch, self.ctx.seed))
        broken, begun, first = 0, time.perf_counter(), stage.step
        while stage.step <= steps:
            if stage.step % every == 0 or stage.step == steps:
                found = self._judge(lambda feeds: judged(current, feeds))
                stage.first_loss = found if stage.step == 0 else stage.first_loss
                if not math.isfinite(stage.first_loss):
                    raise PassError(f"{name}: values of the model are not finite on held-out samples of --calibration")
                if found < stage.best_loss:
                    stage.best_loss, stage.worse = found, 0
                    stage.best = {key: tensor.detach().clone() for key, tensor in current.items()}
                elif stage.step >= EARLIEST * steps:
                    stage.worse += 1
                stage.over = stage.step == steps or stage.worse >= PATIENCE
                stage.optimizer = {} if stage.over else optimizer.state_dict()
                self._save(stage)
                if stage.over:
                    break
            number, at = divmod(stage.step, per_epoch)
            if number != epoch:
                epoch, batches = number, self.data.epoch(number, self.job.batch, self.ctx.seed)
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(stage.step, steps)
            optimizer.zero_grad(set_to_none=True)
            parts = self.data.feeds(batches[at % len(batches)])
            for feeds in parts:
                (loss(current, feeds) / len(parts)).backward()
            broken = 0 if self._gradients_are_fine(current, name) else broken + 1
            if broken > MOST_BROKEN:
                raise PassError(f"{name}: the gradient is not finite {broken} times in a row; try a smaller rate")
            if not broken:
                torch.nn.utils.clip_grad_norm_(list(current.values()), LARGEST_NORM)
                optimizer.step()
            stage.step += 1
            spent = (time.perf_counter() - begun) / (stage.step - first)
            self._say(
                f"{name} {bar(stage.step, steps)} {stage.step}/{steps}, held-out loss {stage.first_loss:.4g} -> "
                f"{stage.best_loss:.4g}, at most {minutes(spent * (steps - stage.step))} left"
            )
        return stage

    def _gradients_are_fine(self, weights: Mapping[str, Tensor], name: str) -> bool:
        """Whether all gradients are numbers. Raises PassError when none reaches any weight."""
        found = [tensor.grad for tensor in weights.values() if tensor.grad is not None]
        if not found:
            raise PassError(f"{name}: no gradient reaches the weights, so nothing can be learned")
        return all(bool(torch.isfinite(gradient).all()) for gradient in found)

    # -- progress and checkpoints

    def _say(self, message: str) -> None:
        now = time.perf_counter()
        if now - self.said >= SAID_EVERY:
            self.said = now
            self.ctx.progress(message)

    def _seconds(self) -> float:
        """Of this run and those that it goes on from."""
        return self.spent + time.perf_counter() - self.start

    def _fingerprint(self) -> str:
        """What the result follows from: a checkpoint of anything else is of no use."""
        job = self.job
        digest = hashlib.sha256()
        digest.update(
            repr((job.record, job.blocks, job.weights, job.keep, job.outputs, job.loss, job.block_steps, job.steps,
                  job.batch, job.rate, self.ctx.seed)).encode()
        )  # fmt: skip
        for name, arrays in sorted((self.ctx.calibration or {}).items()):
            digest.update(name.encode())
            for array in arrays:
                digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        for name in sorted({name for b in job.blocks for name in b.weights} | set(job.weights)):
            digest.update(name.encode() + self.teacher.shared[name].view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        try:
            found = torch.load(self.checkpoint, weights_only=True)
            if found["fingerprint"] == self.print:
                self.done, self.spent = found["done"], found["seconds"]
                log.warning("going on from the checkpoint %s", self.checkpoint)
                return
        except Exception as error:  # whatever a damaged file raises
            log.info("%s: %s", self.checkpoint, error)
        log.warning("%s: is of another run; training starts anew", self.checkpoint)

    def _save(self, stage: _Stage) -> None:
        self.done[stage.name] = stage.state()
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"fingerprint": self.print, "done": self.done, "seconds": self._seconds()}, temporary)
        os.replace(temporary, self.checkpoint)

    def _restored(self, name: str, weights: dict[str, Tensor]) -> _Stage:
        if name in self.done:
            return _Stage(**self.done[name])
        return _Stage(name, weights, {key: tensor.clone() for key, tensor in weights.items()})


def schedule(step: int, steps: int) -> float:
    """The share of the rate: a linear warm-up, then half a cosine down to LOWEST."""
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
