"""The training loop: alternating steps of discriminator and generator, checkpoints, samples, scores, logs."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pixnorm
from pixnorm.training import checkpoint
from pixnorm.training.averaging import averaged, update_average
from pixnorm.training.batches import Batches, loaded
from pixnorm.training.cli import UsageError, extra
from pixnorm.training.data import ImageDataset, LabelMaps, scale_images
from pixnorm.training.logs import SCORES, Log
from pixnorm.training.perceptual import VGGLoss
from pixnorm.training.processes import Processes
from pixnorm.training.recipes import Recipe
from pixnorm.training.sampling import Sampler, grid
from pixnorm.training.seeds import seed_of
from pixnorm.training.settings import BITS, DTYPES, Settings, check
from pixnorm.training.systems import Losses, build_system


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms; an operation that has none raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Trainer:
    """A run of a recipe.

    Args:
        recipe: what to train.
        data: the real images.
        settings: how.
        processes: of the run.

    Raises:
        UsageError: the recipe, the data and the settings do not go together; nothing has been written then.
    """

    def __init__(self, recipe: Recipe, data: ImageDataset, settings: Settings, processes: Processes):
        self.recipe, self.data, self.settings, self.processes = recipe, data, settings, processes
        check(recipe, data, settings, processes)
        self.dtype, self.device = DTYPES[settings.dtype], processes.device
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        torch.manual_seed(settings.seed)
        try:
            self.system = build_system(recipe, data.num_classes, data.label_channels, settings.impl)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if recipe.vgg:
            perceptual = VGGLoss(settings.vgg_weights).to(self.device, self.dtype)
            self.system.perceptual = perceptual
        self.generator, self.discriminator = (self._placed(net) for net in self._networks())
        self.average = averaged(self.generator, recipe.ema) if recipe.ema else None
        betas = recipe.beta1, recipe.beta2
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), recipe.lr_g, betas, recipe.adam_eps)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), recipe.lr_d, betas, recipe.adam_eps)
        self.step, self.seconds = 0, 0.0
        self.bad = torch.zeros((), dtype=torch.bool, device=self.device)
        torch.manual_seed(seed_of(settings.seed, "rank", processes.rank))  # what is drawn differs between processes
        self._resume()
        self._wrap()
        self.batches = self._batches()

    # --- setting up

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        nets = self.system.generator, self.system.discriminator
        if self.processes.world > 1 and self.settings.sync_statistics:
            nets = tuple(pixnorm.convert_sync(net).model for net in nets)
        return nets

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, self.dtype).to(memory_format=self.format)

    def _wrap(self) -> None:
        """The modules that are called in steps: of each network its own, where gradients are averaged over processes,
        and of the other one the network as it is."""
        self.system.generator, self.system.discriminator = self.generator, self.discriminator
        wrapped = [self.generator, self.system.critic()]
        self.called_g, self.called_d = self.generator, self.discriminator
        if self.settings.compile:
            wrapped[0] = self.called_g = torch.compile(self.generator, dynamic=False)
            if self.system.compiles:  # else its loss is differentiated twice, which a compiled graph cannot be
                wrapped[1] = torch.compile(wrapped[1], dynamic=False)
                self.called_d = torch.compile(self.discriminator, dynamic=False)
        if self.processes.world > 1:
            wrapped = [DistributedDataParallel(module) for module in wrapped]
        self.wrapped_g, self.critic = wrapped

    def _batches(self) -> Iterator[Sequence[Tensor]]:
        recipe, settings, of = self.recipe, self.settings, self.processes
        workers = settings.workers
        if workers is None:
            workers = 0 if self.data.in_memory else min(4, os.cpu_count() or 1)
        start = self.step * recipe.d_steps
        order = Batches(len(self.data), recipe.batch_d, settings.seed, start, of.rank, of.world)
        return loaded(self.data, order, workers, self.device)

    # --- steps

    def train(self) -> None:
        """The steps that are left, with all that happens between them.

        Raises:
            UsageError: a loss was not finite; the message names the last good checkpoint.
        """
        settings = self.settings
        with contextlib.ExitStack() as opened:
            log = None
            if self.processes.first:
                opened.enter_context(checkpoint.claim(settings.out))
                log = opened.enter_context(contextlib.closing(Log(settings.out, self.step, settings.tensorboard)))
            if settings.deterministic:
                opened.enter_context(deterministic())
            score = self._scorer()
            self._steps(log, score, opened.enter_context(self._progress()))

    def _steps(self, log: Log | None, score: Callable[[], dict[str, float]] | None, bar) -> None:
        sums: dict[str, Tensor] = {}
        counted, lasted, started = 0, 0.0, time.monotonic()
        while self.step < self.recipe.steps:
            for name, value in self.train_step().items():
                sums[name] = sums.get(name, 0.0) + value
            counted += 1
            due = self._due()
            if due or self.device.type == "cpu":
                self.check_finite()  # waits for a GPU
            passed = time.monotonic() - started
            self.seconds, lasted = self.seconds + passed, lasted + passed
            if "log" in due:
                values = self._averaged(sums, counted)
                values["images_per_second"] = counted * self.recipe.batch_g / max(lasted, 1e-9)
                if log:
                    log.write(self.step, {**values, "seconds": self.seconds})
                    bar.set_postfix({name: f"{values[name]:.3g}" for name in ("loss_d", "loss_g")})
                sums, counted, lasted = {}, 0, 0.0
            bar.update()
            if "sample" in due and log:
                log.image(self.step, self._samples())
            if score and "score" in due:
                found = score()
                if log:
                    log.write(self.step, {**found, "seconds": self.seconds}, SCORES)
            if "checkpoint" in due:
                self.save()
            started = time.monotonic()  # the time of training alone

    def _due(self) -> set[str]:
        """What comes after this step; after the last one, all that is wanted."""
        done = self.step == self.recipe.steps
        wanted = {name: getattr(self.settings, f"{name}_every") for name in ("log", "sample", "score", "checkpoint")}
        return {name for name, every in wanted.items() if every and (done or self.step % every == 0)}

    def train_step(self) -> dict[str, Tensor]:
        """One step of the generator, and before it the discriminator's; returns their losses, as tensors."""
        recipe = self.recipe
        factor = recipe.rate_factor(self.step)
        for optimizer, rate in ((self.optimizer_g, recipe.lr_g), (self.optimizer_d, recipe.lr_d)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        found: dict[str, Tensor] = {}
        for _ in range(recipe.d_steps):
            real = self._placed_images(next(self.batches))
            losses = self._descend(self.optimizer_d, self.critic, real, self._discriminator_loss)
            found = {f"{name}_d": value for name, value in losses.items()}
        self.discriminator.requires_grad_(False)
        losses = self._descend(self.optimizer_g, self.wrapped_g, real, self._generator_loss)
        self.discriminator.requires_grad_(True)
        found |= {f"{name}_g": value for name, value in losses.items()}
        if self.average is not None:
            update_average(self.average, self.generator)
        self.step += 1
        return found

    def _discriminator_loss(self, real: Sequence[Tensor]) -> Losses:
        return self.system.discriminator_loss(self.called_g, self.critic, real)

    def _generator_loss(self, real: Sequence[Tensor]) -> Losses:
        n = self.recipe.batch_g // (self.processes.world * self.settings.accumulate)
        return self.system.generator_loss(self.wrapped_g, self.called_d, real, n)

    def _descend(self, optimizer: torch.optim.Optimizer, wrapped: nn.Module, real: Sequence[Tensor], loss_of) -> Losses:
        """One step of an optimiser, on the mean of the losses of the parts of a batch."""
        optimizer.zero_grad()
        parts = self.settings.accumulate
        means: Losses = {}
        for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in real), strict=True)):
            last = i == parts - 1 or not isinstance(wrapped, DistributedDataParallel)
            with contextlib.nullcontext() if last else wrapped.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
                    losses = loss_of(part)
                (losses["loss"] / parts).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.detach() / parts
        self.bad |= ~means["loss"].isfinite()
        optimizer.step()
        return means

    def _placed_images(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """Real images, scaled, with what is beside them."""
        images, *others = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        images = scale_images(images).to(self.dtype).contiguous(memory_format=self.format)
        return images, *others

    # --- between steps

    def check_finite(self) -> None:
        """Raise a UsageError, in all processes, if a loss in any of them was not finite."""
        bad = self.bad.float()
        if self.processes.sum(bad).item():
            last = checkpoint.newest(self.settings.out)
            where = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UsageError(f"a loss is NaN or infinite after step {self.step}: {where}")

    def save(self) -> None:
        """Write a checkpoint, unless the weights are not finite."""
        self.bad |= ~torch.stack([p.detach().abs().max() for p in self._weights()]).isfinite().all()
        self.check_finite()
        states = self.processes.gather(checkpoint.rng_state(self.device))
        if not self.processes.first:
            return
        contents = {
            "format": checkpoint.FORMAT,
            "version": pixnorm.__version__,
            "recipe": asdict(self.recipe),
            "run": self._run(),
            "step": self.step,
            "seconds": self.seconds,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "rng": states,
        }
        self.settings.out.mkdir(parents=True, exist_ok=True)
        checkpoint.save(checkpoint.path_of(self.settings.out, self.step), contents)
        if self.settings.keep:
            checkpoint.prune(self.settings.out, self.settings.keep)

    def _weights(self) -> Iterator[Tensor]:
        for network in (self.generator, self.discriminator):
            yield from (p for p in network.parameters() if p.numel())

    def _run(self) -> dict[str, Any]:
        """What a checkpoint tells of the run besides its recipe."""
        data, of = self.data, self.processes
        about = {
            "data": data.name,
            "images": len(data),
            "num_classes": data.num_classes,
            "label_channels": data.label_channels,
            "seed": self.settings.seed,
        }
        return {**about, "world": of.world, **{name: getattr(self.settings, name) for name in BITS}}

    def _resume(self) -> None:
        newest = checkpoint.newest(self.settings.out)
        if newest is None:
            return
        if not self.settings.resume:
            raise UsageError(f"{self.settings.out} has a run, up to {newest.name}: --resume continues it")
        contents = checkpoint.load(newest, self.device)
        then, now = contents["run"], self._run()
        others = {*BITS, "world"}
        of_then, last = checkpoint.recipe_of(contents), contents["step"] - 1
        free = {"paper"}  # which only describes it
        if of_then.rate_factor(last) == self.recipe.rate_factor(last) == 1.0:  # no step so far would have been another
            free |= {"steps", "decay_steps"}
        kept = {name: value for name, value in asdict(of_then).items() if name not in free}
        recipes = checkpoint.differences(kept, asdict(self.recipe))
        essential = recipes + [
            text
            for name in now.keys() - others
            for text in checkpoint.differences({name: then.get(name)}, {name: now[name]})
        ]
        if essential:
            raise UsageError(f"{newest} is of another run: {', '.join(sorted(essential))}")
        changed = checkpoint.differences({name: then.get(name) for name in others}, {n: now[n] for n in others})
        if changed and self.processes.first:
            print(f"pixnorm-train: continues with other bits: {', '.join(sorted(changed))}")
        self.generator.load_state_dict(contents["generator"])
        self.discriminator.load_state_dict(contents["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(contents["average"])
        self.optimizer_g.load_state_dict(contents["optimizer_g"])
        self.optimizer_d.load_state_dict(contents["optimizer_d"])
        self.step, self.seconds = contents["step"], contents["seconds"]
        if len(contents["rng"]) == self.processes.world:
            checkpoint.set_rng_state(contents["rng"][self.processes.rank], self.device)
        else:  # as many new ones as there are processes
            torch.manual_seed(seed_of(self.settings.seed, "rank", self.processes.rank, self.step))

    @contextlib.contextmanager
    def sampler(self) -> Iterator[Sampler]:
        """Of the averaged generator, or of the generator, which is in eval mode meanwhile."""
        generator = self.generator if self.average is None else self.average.module
        training = generator.training
        generator.eval()
        psi = {"psi": 1.0} if self.recipe.family.startswith("stylegan") else {}
        try:
            yield Sampler(self.system, generator, **psi)
        finally:
            generator.train(training)

    def _samples(self, n: int = 64) -> Tensor:
        """A grid of images, of the same latent vectors each time; in conditional models a column has one class."""
        if self.data.label_channels:
            conditions = (torch.stack([self.data[i % len(self.data)][1] for i in range(n)]),)
        elif self.system.num_classes:
            conditions = (torch.arange(n) % min(self.system.num_classes, 8),)
        else:
            conditions = ()
        with self.sampler() as sampler:
            return grid(sampler.draw(n, self.settings.seed, 0, conditions), 8)

    def _scorer(self) -> Callable[[], dict[str, float]] | None:
        """A function that scores the generator as it is; all processes call it. The features of the real images are
        computed once, here."""
        settings, of = self.settings, self.processes
        if not settings.score_every:
            return None
        from pixnorm.training.features import default_cache, feature_network
        from pixnorm.training.metrics import real_statistics, score

        total = settings.score_samples
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            weights, cache = settings.inception_weights, default_cache()
            network = feature_network(
                settings.score_network, self.data, weights=weights, cache=cache, device=self.device, processes=of
            )
            # Not the first: those of a folder would be of its first class.
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
            chosen = order[:total].tolist()
            mine = chosen[of.rank :: of.world]
            real = real_statistics(self.data.image_batches(mine), network, processes=of)
        maps = LabelMaps(self.data, chosen) if self.data.label_channels else None

        def scores() -> dict[str, float]:
            with self.sampler() as sampler:
                batches = sampler.batches(total, 125, settings.seed + 1, maps=maps, rank=of.rank, world=of.world)
                return score(batches, real, network, processes=of)

        return scores

    def _averaged(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Means over steps and processes."""
        names = sorted(sums)
        values = torch.stack([sums[name].double() for name in names]) / (count * self.processes.world)
        return dict(zip(names, self.processes.sum(values).tolist(), strict=True))

    def _progress(self):
        return extra("tqdm").tqdm(
            total=self.recipe.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not self.processes.first,
        )
