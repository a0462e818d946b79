"""What preparing a model found out by running it, in a form that can be kept: with it a model is prepared unrun."""

from __future__ import annotations

from dataclasses import dataclass

from harmoq_ao.graph.contractions import SourceKey
from harmoq_ao.sites.site import FloatSite, Role


@dataclass(frozen=True)
class Spot:
    """A contraction in the source of an island, and what stands there.

    Args:
        key: Where its author wrote it.
        op: ``matmul``, ``bmm``, ``mm``, ``baddbmm``, ``einsum``, ``sdpa``, ``linear`` or ``conv2d``.
        index: Its number among those of this operation in the island.
        is_site: Whether a site stands there; else it is the author's call, in float.
        shape: Of a product the contracted length, 0 where it depends on the image; of ``sdpa`` those of both products;
            of a ``linear`` the weight's shape ``(N, K)``.
        role: Of a product, what it does.
        equation: Of an ``einsum``.
        weight: Of a ``linear``, path of the parameter within the island; None if it is computed from parameters.
        location: ``file:line``.
        unit_length: Whether both operands of a product have length one along an axis that depends on the image.
    """

    key: SourceKey
    op: str
    index: int
    is_site: bool = False
    shape: tuple[int, ...] = ()
    role: Role | None = None
    equation: str | None = None
    weight: str | None = None
    location: str | None = None
    unit_length: bool = False

    @property
    def label(self) -> str:
        """Operation and number, as in the names of sites."""
        return f"{self.op}_{self.index}"

    @property
    def attribute(self) -> str | None:
        """Attribute of the island that holds the site's module; None without one."""
        return f"harmoq_{self.label}" if self.is_site else None


@dataclass(frozen=True)
class FoundIsland:
    """A module that contracts in its own forward.

    Args:
        name: Qualified name in the model.
        spots: Its contractions, in the order in which they were met.
        float_reason: Why it runs as its author wrote it, if it does.
    """

    name: str
    spots: tuple[Spot, ...]
    float_reason: str | None = None


@dataclass(frozen=True)
class FoundSite:
    """A site by its name, whose form its island or its module tells.

    Args:
        name: Site name.
        macs: Multiply-accumulates on the example image.
    """

    name: str
    macs: int


@dataclass(frozen=True)
class Found:
    """What preparing a model found.

    Args:
        fingerprint: Of the model that was prepared, see :func:`fingerprint`; None where it has none.
        torch: Version of torch, where contractions stand in torch's own Python; else None.
        sites: Sites in execution order.
        floats: Contractions that stay as the author wrote them.
        islands: Modules that became graphs.
    """

    fingerprint: str | None
    torch: str | None
    sites: tuple[FoundSite, ...]
    floats: tuple[FloatSite, ...]
    islands: tuple[FoundIsland, ...]
