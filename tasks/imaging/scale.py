"""Settle the scale of an image: what was stated, what its smear's red cells say, or what can only be assumed."""

from __future__ import annotations

import math

from leukoflow.core.method import SegmentSettings
from leukoflow.runs.records import ImageScale, ScaleSource
from leukoflow.tasks.imaging.magnification import APART, SAME, SURE_CELLS, Magnification

AS_TRAINED = 1.5
"""Standard deviations within which a measured scale counts as that of the training fields: an image is not resampled by
less than the measurement's own uncertainty, and the same image has the same scale from night to night."""

NO_SCALE = "no scale"
"""How the reason of an image begins whose scale nobody stated and its smear does not tell."""
CONTRADICTED = "scale contradicted"
"""How the reason of an image begins whose stated scale its red cells clearly contradict."""


def settle_scale(
    stated: float | None, of_file: float | None, found: Magnification, settings: SegmentSettings
) -> ImageScale:
    """Choose the scale that is used for an image.

    A stated scale is used; where red cells clearly contradict it, the model must not answer, and where they differ
    from it, that is remarked. Without one the red cells' scale is used. Where these say nothing either, a field's size
    is assumed, and the model must not answer.

    Args:
        stated: micrometres per pixel from the manifest, or given for all images; None where there are none.
        of_file: micrometres per pixel from the image file's metadata.
        found: red cells of the image, or of those that it belongs to.
        settings: of the bundle's method.
    """
    ruler = found.um_per_px
    measured = not math.isnan(ruler)
    if stated is None and of_file is None:
        if not measured:
            return ImageScale(doubt=f"{NO_SCALE}: {found.doubt}; give um_per_px")
        return _measured(found, settings)
    source = ScaleSource.METADATA if stated is None else ScaleSource.MANIFEST
    used = of_file if stated is None else stated
    assert used is not None
    doubt, remarks = "", []
    if measured:
        away, words = abs(math.log(used / ruler)), f"{_name(source)} {used:.3g} µm per pixel, red cells say {ruler:.3g}"
        if away > max(APART, 3 * found.sd):
            doubt = f"{CONTRADICTED}: {words}; check um_per_px"
        if away > max(SAME, 2 * found.sd):
            remarks.append(f"{words} ± {ruler * found.sd:.2g}")
    if stated is not None and of_file is not None and abs(math.log(stated / of_file)) > math.log(1.1):
        remarks.append(f"stated scale {stated:.3g} µm per pixel, the file says {of_file:.3g}")
    return ImageScale(used, source, None, used, doubt, "; ".join(remarks))


def stated_scale(stated: float | None) -> ImageScale:
    """Return the scale of an image of which nothing was measured: what was stated, else an assumption without doubt."""
    source = ScaleSource.ASSUMED if stated is None else ScaleSource.MANIFEST
    return ImageScale(stated, source, None, stated)


def _measured(found: Magnification, settings: SegmentSettings) -> ImageScale:
    ruler = found.um_per_px
    away = abs(math.log(ruler / settings.um_per_px))
    as_trained = away <= AS_TRAINED * found.sd
    # To fewer digits than it is sure of, so that a neighbour more or less does not resample an image.
    um_per_px = settings.um_per_px if as_trained else float(f"{ruler:.3g}")
    doubt = ""
    if found.images == 1 and found.cells < SURE_CELLS and not as_trained:
        doubt = (
            f"{NO_SCALE}: {found.cells} round red cells in the image alone, {SURE_CELLS} are needed where they are not "
            f"of the usual size; give um_per_px"
        )
    remark = "scale from the red cells of this image alone" if found.images == 1 else ""
    return ImageScale(um_per_px, ScaleSource.RULER, float(f"{um_per_px * found.sd:.2g}"), None, doubt, remark)


def _name(source: ScaleSource) -> str:
    return "the file's scale" if source is ScaleSource.METADATA else "stated scale"
