"""The prepared model: the author's model with a site at every contraction, and the traits of its images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from harmoq_ao.common.calling import call_with_image, image_parameter
from harmoq_ao.common.errors import InputError, SavedModelError
from harmoq_ao.common.structure import image_of
from harmoq_ao.common.traits import TILINGS, ImageTraits
from harmoq_ao.config import HarmoqConfig, SiteSettings
from harmoq_ao.graph.exchange import original_class
from harmoq_ao.images import check_image_tensor
from harmoq_ao.sites.base import PreparedSite
from harmoq_ao.sites.history import History
from harmoq_ao.sites.report import Report, float_rows
from harmoq_ao.sites.site import FloatSite, Site

_LONGEST_NAME = 200
_DEFAULTS = ImageTraits().image_traits()


@dataclass(frozen=True)
class ModelTraits(ImageTraits):
    """Image requirements of a model, and how to build it.

    Args:
        scale: Output pixels per input pixel along each side.
        architecture: Description from :func:`architecture_spec`, or None if it cannot be built from one.
    """

    scale: int = 1
    architecture: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; what older readers do not know only where it differs from the default."""
        always = ("scale", "size_multiple", "size_minimum", "architecture")
        return {name: v for name, v in asdict(self).items() if name in always or v != _DEFAULTS[name]}

    @classmethod
    def from_dict(cls, data: Any) -> ModelTraits:
        """Inverse of :meth:`to_dict`.

        Raises:
            SavedModelError: Unknown or ill-typed entries.
        """
        if not isinstance(data, dict) or not _valid(data):
            raise SavedModelError("The traits of a saved model are not valid", found=repr(data)[:200])
        return cls(**data | {"size_multiple": max(1, data["size_multiple"])})


def _valid(data: dict[str, Any]) -> bool:
    """Whether these are entries of :meth:`ModelTraits.to_dict`, each of its kind."""
    numbers = ("scale", "size_multiple", "size_minimum")
    names = [data.get(name) for name in ("output", "keyword")]
    return (
        {*numbers, "architecture"} <= set(data) <= {*numbers, "architecture", *_DEFAULTS}
        and all(type(data[n]) is int and 0 <= data[n] <= 1024 for n in numbers)
        and type(data.get("square", False)) is bool
        and data.get("tiling", _DEFAULTS["tiling"]) in TILINGS
        and all(n is None or (isinstance(n, str) and 0 < len(n) <= _LONGEST_NAME) for n in names)
        and isinstance(data["architecture"], (dict, type(None)))
    )


class AuthorModel(nn.Module):
    """An author's model with modules of ours in it, called as the original is.

    Attributes:
        model: The author's model.
        config: What to quantize.
        traits: What its images are like, and how it is called.
        example_shapes: Shapes of the image batches it was prepared on.
    """

    def __init__(self, model: nn.Module, config: HarmoqConfig, traits: ModelTraits) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.traits = traits
        self.example_shapes: list[tuple[int, ...]] = []
        self._parameter = image_parameter(original_class(model)).name

    def image(self, image: Tensor) -> Tensor:
        """The image `[B, C, sH, sW]` within the model's output for `[B, C, H, W]`, whatever else that holds.

        Raises:
            InputError: See :meth:`forward`; or the output holds no image where it did when the model was prepared.
        """
        return image_of(self(image), self.traits.output)

    def _given(self, image: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The image of a call, taken out of the keywords where it was given by its author's name."""
        if image is not None:
            return image
        if self._parameter not in kwargs:
            raise InputError("This call has no image", expected=f"model(x) or model({self._parameter}=x)")
        given: Tensor = kwargs.pop(self._parameter)
        return given

    def _call(self, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the author's model returns."""
        return call_with_image(self.model, self.traits.keyword, image, *args, **kwargs)


class PreparedModel(AuthorModel):
    """A model with a site at every contraction; call it as the original.

    Attributes:
        model: The author's model, on whose modules the sites stand.
        config: The configuration.
        floats: Contractions that stay float, with the reason.
        example_shapes: Shapes of the image batches it was prepared on.
        traits: Scale, size requirements and architecture.
        order: Paths of the sites in execution order.
        history: How its sites were solved, or None before.
        fingerprint: Of the float model (:func:`harmoq_ao.preparation.fingerprint.fingerprint`), or None.
    """

    def __init__(self, model: nn.Module, config: HarmoqConfig, traits: ModelTraits) -> None:
        super().__init__(model, config, traits)
        self.floats: list[FloatSite] = []
        self.order: list[str] = []
        self.history: History | None = None
        self.fingerprint: str | None = None

    def forward(self, image: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the model on an image batch `[B, C, H, W]` in 0..1, given by position or by its author's name.

        Raises:
            InputError: No image, not an image batch, or not finite.
        """
        image = self._given(image, kwargs)
        check_image_tensor(image)
        return self._call(image, args, kwargs)

    def sites(self) -> list[PreparedSite]:
        """Site modules in execution order; sites met later, at other image sizes, come last."""
        found = {m.site.path: m for m in self.model.modules() if isinstance(m, PreparedSite)}
        known = [found.pop(path) for path in self.order if path in found]
        return known + list(found.values())

    def settings(self, site: Site) -> SiteSettings:
        """Quantizers of a site under the configuration."""
        return self.config.settings(site.name, site.kind)

    def report(self) -> Report:
        """One row per site: bits, quantization range, joint scale, SQNR, and why a site stays float."""
        rows = [site.report_row(self.settings(site.site)) for site in self.sites()]
        return Report("prepared model", rows + float_rows(self.floats))
