"""The method's settings. They belong to the bundle that was calibrated with them, and are stored in its JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Frozen, strict about unknown names: a misspelt setting is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class QualitySettings(Settings):
    """Thresholds of the quality stage; a field that fails one is rejected with the reason, before the model sees it."""

    min_focus: float = 0.5
    min_exposure: float = 0.25
    max_exposure: float = 0.985
    max_saturated: float = 0.90
    min_foreground: float = 0.005
    max_stain: float = 1.0


class NormalizeSettings(Settings):
    """Stain and illumination normalisation. Switches exist for ablation; nothing of it is fitted on data."""

    mask_overlays: bool = True
    reinhard: bool = True
    clahe: bool = True
    multiscale: bool = True
    background: tuple[float, float, float] = (250.0, 128.0, 128.0)  # OpenCV 8-bit Lab: bright, without a hue
    red_lightness: float = 198.0  # of red cells, same units
    clahe_clip: float = Field(1.5, gt=0)
    clahe_grid: int = Field(4, ge=1)
    multiscale_amount: float = Field(0.3, ge=0)


class SegmentSettings(Settings):
    """Geometry of the field that the U-Net sees, and how its classes become single cells."""

    enabled: bool = True
    field_px: int = 224
    um_per_px: float = 0.42  # of the training fields: a red cell of 7.2 um is about 17 px wide
    assumed_field_px: int = 1024  # an image of unknown scale up to this long is one microscope field
    tile_overlap_px: int = 32
    min_cell_area_px: int = 80
    min_nucleus_area_px: int = 40
    peak_distance_px: int = 7
    touching_border: bool = True  # cells cut by the field's edge are kept


class FeatureSettings(Settings):
    """Crops and backbones. `field_batch` and `cell_batch` fix the shapes, so that floats never depend on neighbours."""

    convnext: bool = True
    nasnet: bool = True
    cell_px: int = 64  # side of a cell's crop as the backbone sees it
    cell_window_px: int = 44  # side of the window around the cell's centroid, in field pixels
    field_batch: int = 16  # of the segmenter
    cell_batch: int = 64


class SelectSettings(Settings):
    """mRMR."""

    enabled: bool = True
    k: int = 384
    scheme: Literal["fcq", "fcd"] = "fcq"


class ClassifySettings(Settings):
    """Self-attention over field and cells."""

    attention: bool = True
    max_cells: int = 32


class MethodSettings(Settings):
    """Everything that decides what the numbers are, apart from weights."""

    quality: QualitySettings = QualitySettings()
    normalize: NormalizeSettings = NormalizeSettings()
    segment: SegmentSettings = SegmentSettings()
    features: FeatureSettings = FeatureSettings()
    select: SelectSettings = SelectSettings()
    classify: ClassifySettings = ClassifySettings()
