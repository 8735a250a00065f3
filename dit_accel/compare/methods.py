"""What is compared: the stock model, our profiles, and other projects' methods, all alike."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_accel.api import session_of
from dit_accel.compare.external import EXTERNALS, Setting, check_parameters
from dit_accel.compare.results import AGAIN, DENSE, ProfileInfo
from dit_accel.compare.specs import Spec, load_spec, parameters_of
from dit_accel.compare.timing import device_of
from dit_accel.engine.call import Site
from dit_accel.engine.ledger import Tally, total_of
from dit_accel.engine.profile import Profile
from dit_accel.errors import DitAccelError, unknown
from dit_accel.hosts.diffusers.session import DiffusersSession


@dataclass(frozen=True)
class Receipt:
    """What a profile's attention did in one call; see `results.Clip` for the fields."""

    attention_s: float | None = None
    compile_s: float = 0.0
    launched_density: float | None = None
    kept_density: float | None = None
    density_map: list[list[float | None]] = field(default_factory=list)
    layer_names: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    cross_calls: dict[str, int] = field(default_factory=dict)


class Method(ABC):
    """One way to run a pipeline: `with method.on(pipe, call): pipe(**call)`.

    `compile_s` is what its kernels took to compile before the first call.
    """

    info: ProfileInfo
    compile_s: float = 0.0

    @abstractmethod
    def on(self, pipe: Any, call: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A block in which the pipeline runs this way; afterwards it is the stock one again."""

    def prepare(self, setting: Setting) -> None:  # noqa: B027  (most need nothing)
        """What must happen once, before the first call."""

    def receipt(self, pipe: Any) -> Receipt:
        """What the call that just ended did; only inside the block."""
        return Receipt()


class ProfileMethod(Method):
    """A profile of ours; "dense" is the stock model under the report's clock."""

    def __init__(self, spec: Spec, strict: bool | str = False, backend: str | None = None) -> None:
        kind = "dense" if spec.name == DENSE else "profile"
        self.info = ProfileInfo(spec.name, kind, spec.text)  # type: ignore[arg-type]
        self.profile = spec.profile
        self._options = {"strict": strict, "backend": backend}

    @contextmanager
    def on(self, pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
        pipe.enable_sparse_attention(self.profile, **self._options)
        try:
            self.compile_s += _warm(pipe, call)
            yield
        finally:
            pipe.disable_sparse_attention()

    def receipt(self, pipe: Any) -> Receipt:
        session = session_of(pipe)
        run = session.run_of(pipe)
        cells, sites = run.ledger.cells(), self_sites(session)
        report = session.report_of(pipe)
        total = total_of("self", cells)
        return Receipt(
            attention_s=report.time["attention_s"],
            compile_s=report.time["compile_s"] or 0.0,
            launched_density=_density(total),
            kept_density=(total.kept + total.dense) / total.calls if total.calls else None,
            density_map=density_map(sites, cells, run.steps),
            layer_names=site_names(sites),
            calls=_outcomes(report.kinds["self"]),
            cross_calls=_outcomes(report.kinds["cross"]),
        )


class ExternalMethod(Method):
    """A method of another project; see `external.EXTERNALS`."""

    def __init__(self, name: str, label: str, parameters: dict[str, Any]) -> None:
        self._entry = EXTERNALS[name]
        self._parameters = parameters
        self.info = ProfileInfo(label, "external", self._entry.text, self._entry.missing())
        if self.info.skipped is None:
            check_parameters(name, parameters)

    def prepare(self, setting: Setting) -> None:
        self._parameters = self._entry.prepare(setting, self._parameters)

    def on(self, pipe: Any, call: Mapping[str, Any]) -> AbstractContextManager[None]:
        return self._entry.enabled(pipe, self._parameters)


def density_map(
    sites: Sequence[Site], cells: Mapping[tuple[Site, int], Tally], steps: int
) -> list[list[float | None]]:
    """[sites][steps] of the launched density; None where a site did not run."""
    return [
        [_density(cell) if (cell := cells.get((site, step))) else None for step in range(steps)]
        for site in sites
    ]


def self_sites(session: DiffusersSession) -> list[Site]:
    """The self-attention sites in the order of the forward."""
    return [bound.site for bound in session.sites if bound.site.kind == "self"]


def site_names(sites: Sequence[Site]) -> list[str]:
    """Names of sites, with their expert where there are several."""
    several = len({site.expert for site in sites}) > 1
    return [f"{site.expert}.{site.name}" if several else site.name for site in sites]


def _outcomes(kind: Mapping[str, Any]) -> dict[str, int]:
    """A report's calls of one kind by outcome, see `results.Clip`."""
    return {
        **{name: kind[name] for name in ("sparse", "reused") if kind[name]},
        **{f"dense: {why}": n for why, n in sorted(kind["dense_reasons"].items())},
    }


def choose_methods(
    profiles: Sequence[str | Path | Profile],
    against: Sequence[str] = (),
    *,
    family: str | None = None,
    breakeven: bool | None = None,
    strict: bool | str = False,
    backend: str | None = None,
) -> list[Method]:
    """The methods to compare, dense first.

    Args:
        profiles: specs (see `specs`), paths or profiles; dense is added where it is missing, and
            a second "dense" runs as "dense again".
        against: names of `EXTERNALS`, with `:key=value` for their parameters; "all" for all.
        family: the model's family, whose shipped profiles names refer to.
        breakeven: set in every profile where it is not None.

    Raises:
        DitAccelError: an unknown name or parameter; two methods with one name.
    """
    specs = [load_spec(each, family, breakeven) for each in profiles]
    dense = [spec for spec in specs if spec.name == DENSE]
    if not dense:
        specs = [load_spec(DENSE, family), *specs]
    for extra in dense[1:]:  # the noise of the measurement: dense against dense
        specs[specs.index(extra, specs.index(dense[0]) + 1)] = replace(extra, name=AGAIN)
    specs.sort(key=lambda spec: spec.name != DENSE)
    methods: list[Method] = [ProfileMethod(spec, strict, backend) for spec in specs]
    names = list(EXTERNALS) if "all" in against else against
    methods += [_external(each) for each in names]
    _check_names([method.info.name for method in methods])
    return methods


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DitAccelError(f"two of the profiles are called {name!r}: leave one out.")


def _external(spec: str) -> ExternalMethod:
    name = spec.partition(":")[0].strip()
    if name not in EXTERNALS:
        raise unknown("method for --against", name, [*EXTERNALS, "all"])
    return ExternalMethod(name, spec, parameters_of(spec))


def _density(tally: Tally) -> float | None:
    """Mean over all calls: launched of the sparse ones, 1 for a dense and 0 for a reused one."""
    return (tally.launched + tally.dense) / tally.calls if tally.calls else None


def _warm(pipe: Any, call: Mapping[str, Any]) -> float:
    """Compile the profile's kernels, so that no timed call does. Returns the seconds it took."""
    if device_of(pipe).type != "cuda":
        return 0.0
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = {n: p.default for n, p in parameters.items() if isinstance(p.default, int)}
    size = {n: call.get(n) or defaults.get(n) for n in ("height", "width", "num_frames")}
    if not size["height"] or not size["width"]:
        return 0.0
    pipe.sparse_attention_warmup(size["height"], size["width"], size["num_frames"] or 1)
    return pipe.sparse_attention_report().time["compile_s"] or 0.0
