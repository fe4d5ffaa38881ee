"""The trainer of widths: which products of a model read 8 bits of their weights and which 4, once or for each input.

Every product is computed as x · first + gate · (x · second), with a gate for each row and group of products. The loss
is the divergence of the outputs from the original's. Its derivatives by the gates, at gates between 0 and 1, add up to
what all second parts together are worth (integrated gradients, Sundararajan et al., arXiv 1703.01365), so they tell
what each group is worth, for all inputs and for every row. Groups with the most worth for their size are wide in the
fixed choice. A network of two layers learns the worth for a row from the row's features, and then with the whole model
behind it: gates are steps of its scores with Gumbel noise, whose derivatives are those of a sigmoid (Jang et al., arXiv
1611.01144), and the price of a bit follows the mean width that is asked for.

A tenth of the samples is held out; it decides what is kept. A checkpoint beside the output lets an interrupted run go
on. Importing this file imports torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from graphwright.passes.base import PassContext, Weights, WidthJob
from graphwright.passes.errors import PassError
from graphwright.passes.quality import held_out
from torch import Tensor

from .fit import divergence
from .progress import minutes
from .torch_graph import TorchGraph

FAST_STEPS, FAST_RATE, FAST_BATCH = 600, 2e-3, 256  # of learning from worths alone
DECAY, DROPOUT = 0.1, 0.2
CLIPPED = 0.01  # share of the worths of a group that are cut off at each end: they have long tails
EVALUATIONS = 5  # of learning with the whole model
PRICE_RATE = 0.05  # by how much the price of a bit follows, for a bit of difference in a step
TEMPERATURE = 1.0
MOST_SCORED = 32  # samples whose worths are measured
SAID_EVERY = 2.0  # seconds between two lines of progress

log = logging.getLogger("graphwright")

# Gates (.., groups) of all groups; or of those behind the led ones, from features (1, rows, n) -> (1, rows, groups).
Gates: TypeAlias = "Tensor | Callable[[Tensor], Tensor]"


class Student(TorchGraph):
    """The model with products in two parts."""

    def __init__(self, job: WidthJob, shared: dict[str, Tensor]) -> None:
        super().__init__(job.model, shared)
        self.parts = {site: tuple(map(torch.from_numpy, both)) for site, both in job.parts.items()}
        self.group = {site: number for number, group in enumerate(job.groups) for site in group}
        self.features, self.led = job.features, job.led
        self.gates: Gates = torch.ones(len(job.groups))
        self.now: Tensor | None = None  # gates that the latest run found from features

    def _compute(self, node: Any, given: list[Tensor | None], outer: Mapping[str, Any]) -> Any:
        site = node.outputs[0].name
        if site not in self.parts:
            found = super()._compute(node, given, outer)
            for value, result in zip(node.outputs, found, strict=False):
                if value.name == self.features and not isinstance(self.gates, Tensor):
                    self.now = self.gates(result)
            return found
        x = given[0]
        assert x is not None
        first, second = self.parts[site]
        number = self.group[site]
        rest = x @ second
        gates = self.gates if isinstance(self.gates, Tensor) else None
        if gates is None and number >= self.led:
            assert self.now is not None, "features come before what is chosen by them"
            gates = self.now
        if gates is not None:
            if gates.dim() > 1 and gates.shape[:-1] != rest.shape[:-1]:
                rows, chosen = list(rest.shape[:-1]), list(gates.shape[:-1])
                raise PassError(
                    f"{site} computes rows {rows}, but widths are chosen for {chosen}; give inputs for which every row "
                    "goes through all products"
                )
            rest = gates[..., number : number + 1] * rest
        y = x @ first + rest
        bias = given[2] if len(given) > 2 else None
        return (y if bias is None else y + bias,)


class Network(torch.nn.Module):
    """Features (rows, n) -> for each group how much its wide score is above its narrow one."""

    def __init__(self, mean: Tensor, spread: Tensor, hidden: int, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.first = torch.nn.Linear(len(mean), hidden)
        self.second = torch.nn.Linear(hidden, len(bias))
        self.dropout = torch.nn.Dropout(DROPOUT)
        with torch.no_grad():
            self.second.weight.mul_(0.1)
            self.second.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.first((features - self.mean) / self.spread))
        return self.second(self.dropout(hidden))

    def arrays(self) -> dict[str, np.ndarray]:
        """As `passes.quantize.nested.Selector` holds it: the normalization in the first layer, a narrow score of 0
        beside each wide one."""
        first = self.first.weight / self.spread
        bias = self.first.bias - first @ self.mean
        second = torch.zeros(self.second.in_features, self.second.out_features, 2)
        second[..., 1] = self.second.weight.T
        ends = torch.zeros(self.second.out_features, 2)
        ends[:, 1] = self.second.bias
        found = {"first": first.T, "first_bias": bias, "second": second.flatten(1), "second_bias": ends.flatten()}
        return {name: np.ascontiguousarray(tensor.detach().float().numpy()) for name, tensor in found.items()}


def train(job: WidthJob, ctx: PassContext) -> Weights:
    """Choose widths on the calibration inputs. Returns the selector's arrays where one is learned, as `sites` the
    numbers of the groups that are wide in the fixed choice, and figures. Raises PassError for too few inputs."""
    return _Trainer(job, ctx, ctx.output.with_name(f"{ctx.output.name}.widths")).run()


class _Trainer:
    def __init__(self, job: WidthJob, ctx: PassContext, checkpoint: Path) -> None:
        self.job, self.ctx, self.checkpoint = job, ctx, checkpoint
        shared: dict[str, Tensor] = {}
        self.teacher = TorchGraph(job.model, shared)
        self.student = Student(job, shared)
        outputs = [v.name or "" for v in job.model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()]
        if not outputs:
            raise PassError("the model has no output of floats to judge widths by")
        self.output = outputs[0]
        samples = ctx.calibration or {}
        count = min((len(arrays) for arrays in samples.values()), default=0)
        self.apart = held_out(count)
        if not self.apart:
            raise PassError(f"{count} calibration samples; widths need at least 10, of which one is held out")
        self.learned = [i for i in range(count) if i not in set(self.apart)]
        sizes = [sum(job.parts[site][0].size for site in group) for group in job.groups]
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        self.share = (self.sizes / self.sizes.sum()).float()  # of all weights
        low, high = job.bits
        self.wanted = (job.mean - low) / (high - low)  # share of weights that are wide
        self.said, self.start, self.spent = 0.0, time.perf_counter(), 0.0

    def run(self) -> Weights:
        state = self._resume()
        if "worths" not in state:
            features, worths = self._worths()
            state.update(features=features, worths=worths)
            self._save(state)
        worths = state["worths"]
        wide = fixed_choice(worths.mean(0), self.sizes, self.wanted)
        fixed = torch.zeros(len(self.sizes))
        fixed[list(wide)] = 1
        stats: dict[str, int | float | str] = {
            "loss_narrow": self._judge(torch.zeros(len(self.sizes)))[0],
            "loss_wide": self._judge(torch.ones(len(self.sizes)))[0],
            "loss_static": self._judge(fixed)[0],
        }
        arrays: dict[str, np.ndarray] = {}
        if self.job.learn:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a second one costs these small products more than it gives
            try:
                network, price = self._from_worths(state["features"], worths)
            finally:
                torch.set_num_threads(threads)
            loss, share = self._judge(self._hard(network))
            stats.update({"loss_first": loss})
            network = self._with_model(network, price, state)
            loss, share = self._judge(self._hard(network))
            low, high = self.job.bits
            stats.update({"loss_dynamic": loss, "bits_dynamic": low + (high - low) * share})
            arrays = network.arrays()
        stats["seconds"] = round(self.spent + time.perf_counter() - self.start, 1)
        self.checkpoint.unlink(missing_ok=True)
        return Weights(arrays, tuple(str(i) for i in wide), self.job.record, stats)

    # -- one sample

    def _feeds(self, index: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.array(a[index])) for name, a in (self.ctx.calibration or {}).items()}

    def _loss(self, index: int, gates: Gates) -> Tensor:
        feeds = self._feeds(index)
        with torch.no_grad():
            wanted = self.teacher.run(feeds, [self.output])[self.output]
        self.student.gates = gates
        return divergence(self.student.run(feeds, [self.output])[self.output], wanted)

    def _share(self, gates: Tensor | None = None) -> Tensor:
        """The mean share of weights that are wide, by gates that features gave, by default those of the latest run: the
        led ones are."""
        gates = self.student.now if gates is None else gates
        assert gates is not None
        led = torch.arange(len(self.share)) < self.job.led
        return (torch.where(led, torch.ones(()), gates) * self.share).sum(-1).mean()

    def _judge(self, gates: Gates) -> tuple[float, float]:
        """Mean loss over what is held out, and the share of weights that are wide there."""
        total, wide = 0.0, 0.0
        with torch.no_grad():
            for number, index in enumerate(self.apart):
                total += float(self._loss(index, gates))
                wide += float((gates * self.share).sum() if isinstance(gates, Tensor) else self._share())
                self._say(f"widths: held-out sample {number + 1} of {len(self.apart)}")
        return total / len(self.apart), wide / len(self.apart)

    # -- what the second parts are worth

    def _worths(self) -> tuple[Tensor, Tensor]:
        """Features (rows, n) and worths (rows, groups), by which the loss of a row's sample falls: of each sample at
        one height of all gates, drawn evenly."""
        features, worths = [], []
        chosen = self.learned[:: max(1, len(self.learned) // MOST_SCORED)][:MOST_SCORED]
        heights = np.random.default_rng(self.ctx.seed).permutation((np.arange(len(chosen)) + 0.5) / len(chosen))
        for number, (index, height) in enumerate(zip(chosen, heights, strict=True)):
            with torch.no_grad():
                rows = self.teacher.run(self._feeds(index), [self.job.features])[self.job.features]
            gates = torch.full((*rows.shape[:-1], len(self.sizes)), float(height), requires_grad=True)
            self._loss(index, gates).backward()
            assert gates.grad is not None
            flat = rows.reshape(-1, rows.shape[-1])
            worths.append(-gates.grad.reshape(len(flat), -1) * len(flat))
            features.append(flat)
            self._say(f"widths: worth of sample {number + 1} of {len(chosen)}")
        return torch.cat(features), torch.cat(worths)

    # -- learning

    def _from_worths(self, features: Tensor, worths: Tensor) -> tuple[Network, float]:
        """A network that finds rows and groups of much worth for their size, and the price of all bits it pays."""
        generator = torch.Generator().manual_seed(self.ctx.seed)
        torch.manual_seed(self.ctx.seed)
        low, high = worths.quantile(CLIPPED, 0), worths.quantile(1 - CLIPPED, 0)
        clipped = worths.clamp(low, high)
        per_share = worths.mean(0) / self.share
        order = per_share.argsort(descending=True)
        bought = self.share[order].cumsum(0)
        price = float(per_share[order][min(int((bought < self.wanted).sum()), len(order) - 1)])
        price = max(price, 1e-9)
        bias = (per_share / price - 1).clamp(-3, 3)
        network = Network(features.mean(0), features.std(0).clamp(min=1e-6), self.job.hidden, bias)
        optimizer = torch.optim.AdamW(network.parameters(), FAST_RATE, weight_decay=DECAY)
        gains = clipped / price
        log_price = 0.0
        for _ in range(FAST_STEPS):
            rows = torch.randint(len(features), (FAST_BATCH,), generator=generator)
            gates = torch.sigmoid(network(features[rows]) / TEMPERATURE)
            gates = torch.cat([torch.ones(len(rows), self.job.led), gates[:, self.job.led :]], 1)
            cost = float(np.exp(log_price)) * (gates * self.share).sum(1).mean()
            loss = cost - (gates * gains[rows]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                log_price += PRICE_RATE * float((gates * self.share).sum(1).mean() - self.wanted)
        network.eval()
        self._settle(network, features)
        return network, price * float(np.exp(log_price))

    def _settle(self, network: Network, features: Tensor) -> None:
        """Move all scores alike so that the mean width on these features is what is asked for."""
        network.eval()
        with torch.no_grad():
            scores = network(features)
            low, high = float(scores.min()) - 1, float(scores.max()) + 1
            for _ in range(50):
                middle = (low + high) / 2
                share = float(self._share((scores > middle).float()))
                low, high = (middle, high) if share > self.wanted else (low, middle)
            network.second.bias.sub_(high)

    def _hard(self, network: Network) -> Gates:
        network.eval()
        return lambda features: (network(features) > 0).float()

    def _with_model(self, network: Network, price: float, state: dict[str, Any]) -> Network:
        """The network after steps with the whole model, or before them where they do not help."""
        steps = self.job.steps
        if not steps:
            return network
        generator = torch.Generator()
        optimizer = torch.optim.AdamW(network.parameters(), self.job.rate, weight_decay=DECAY)
        best_loss, _ = self._judge(self._hard(network))
        best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        first = 0
        if "network" in state:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            first, price, best_loss, best = state["step"], state["price"], state["best_loss"], state["best"]
        begun, low = time.perf_counter(), price / 30
        for step in range(first, steps):
            generator.manual_seed(self.ctx.seed * 1_000_003 + step)
            torch.manual_seed(self.ctx.seed * 1_000_003 + step)
            index = self.learned[int(torch.randint(len(self.learned), (1,), generator=generator))]

            def stepped(features: Tensor) -> Tensor:
                scores = network(features)
                noise = torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
                moved = scores + noise.log() - (1 - noise).log()
                soft = torch.sigmoid(moved / TEMPERATURE)
                return (moved > 0).float() + soft - soft.detach()

            network.train()
            loss = self._loss(index, stepped)
            share = self._share()
            optimizer.zero_grad()
            (loss + price * share).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            price = max(low, price * float(np.exp(PRICE_RATE * 8 * (share.item() - self.wanted))))
            spent = (time.perf_counter() - begun) / (step + 1 - first)
            self._say(f"widths: step {step + 1} of {steps}, at most {minutes(spent * (steps - step - 1))} left")
            if (step + 1) % max(1, steps // EVALUATIONS) == 0 or step + 1 == steps:
                kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
                self._settle(network, state["features"])
                found, share_apart = self._judge(self._hard(network))
                log.info("widths: step %d, held-out loss %.5f at a share of %.3f", step + 1, found, share_apart)
                if found < best_loss:
                    best_loss, best = found, {name: tensor.clone() for name, tensor in network.state_dict().items()}
                network.load_state_dict(kept)
                state.update(
                    network=kept, optimizer=optimizer.state_dict(), step=step + 1, price=price, best_loss=best_loss,
                    best=best,
                )  # fmt: skip
                self._save(state)
        network.load_state_dict(best)
        return network

    # -- progress and checkpoints

    def _say(self, message: str) -> None:
        now = time.perf_counter()
        if now - self.said >= SAID_EVERY:
            self.said = now
            self.ctx.progress(message)

    def _fingerprint(self) -> str:
        """What the result follows from."""
        job, digest = self.job, hashlib.sha256()
        options = (job.record, job.groups, job.led, job.features, job.mean, job.steps, self.ctx.seed)
        digest.update(repr(options).encode())
        for name, arrays in sorted((self.ctx.calibration or {}).items()):
            digest.update(name.encode())
            for array in arrays:
                digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        for site, both in sorted(job.parts.items()):
            digest.update(site.encode() + both[0].tobytes()[:4096] + both[1].tobytes()[:4096])
        return digest.hexdigest()

    def _resume(self) -> dict[str, Any]:
        self.print = self._fingerprint()
        if not self.checkpoint.is_file():
            return {}
        try:
            found = torch.load(self.checkpoint, weights_only=True)
            if found["fingerprint"] == self.print:
                self.spent = found["seconds"]
                log.warning("going on from the checkpoint %s", self.checkpoint)
                return dict(found["state"])
        except Exception as error:  # whatever a damaged file raises
            log.info("%s: %s", self.checkpoint, error)
        log.warning("%s: is of another run; widths are chosen anew", self.checkpoint)
        return {}

    def _save(self, state: dict[str, Any]) -> None:
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        seconds = self.spent + time.perf_counter() - self.start
        torch.save({"fingerprint": self.print, "state": state, "seconds": seconds}, temporary)
        os.replace(temporary, self.checkpoint)


def fixed_choice(worths: Tensor, sizes: Tensor, share: float) -> tuple[int, ...]:
    """The groups that are wide where widths are the same for all inputs: those with the most worth for a weight, as
    many as fit into this share of all weights. Smaller ones are passed over only where they do not fit."""
    left = share * float(sizes.sum()) * (1 + 1e-9)
    chosen = []
    for number in (worths.double() / sizes).argsort(descending=True).tolist():
        if float(worths[number]) > 0 and float(sizes[number]) <= left:
            chosen.append(number)
            left -= float(sizes[number])
    return tuple(sorted(chosen))
