"""The published recipes: what each trains, what the paper reports for it, and its commands.

The figures are the paper's; md2 has not measured them. Godard et al., "Digging Into Self-Supervised Monocular Depth
Estimation", ICCV 2019: Tables 1 and 2 (KITTI 2015, Eigen test images, raw velodyne, Garg crop, capped at 80 m), and the
supplement's tables for ResNet-50 and odometry. A recipe without a figure has none in the paper. Recipes for other
papers' encoders, decoders and augmentation have their figures, with the source, in a note.

The settings come from sections 4 and 4.1 (20 epochs, lr 1e-4, after 15 epochs 1e-5, batch 12, one nominal camera for
all images), and from the released code's README and experiments/*.sh (splits; 30 epochs without pretraining and on the
odometry split; 5 epochs at 1e-5 for 1024x320).
"""

from __future__ import annotations

from dataclasses import dataclass

from md2.config import Config, load_config, recipes

_P = "monodepth2_resnet18_kitti_"
_FIGURES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
_ROWS: dict[str, tuple[float, ...]] = {
    # In the order of _FIGURES.
    f"{_P}mono_640x192": (0.115, 0.903, 4.863, 0.193, 0.877, 0.959, 0.981),
    f"{_P}stereo_640x192": (0.109, 0.873, 4.960, 0.209, 0.864, 0.948, 0.975),
    f"{_P}mono_stereo_640x192": (0.106, 0.818, 4.750, 0.196, 0.874, 0.957, 0.979),
    f"{_P}mono_1024x320": (0.115, 0.882, 4.701, 0.190, 0.879, 0.961, 0.982),
    f"{_P}stereo_1024x320": (0.107, 0.849, 4.764, 0.201, 0.874, 0.953, 0.977),
    f"{_P}mono_stereo_1024x320": (0.106, 0.806, 4.630, 0.193, 0.876, 0.958, 0.980),
    f"{_P}mono_no_pretraining_640x192": (0.132, 1.044, 5.142, 0.210, 0.845, 0.948, 0.977),
    f"{_P}stereo_no_pretraining_640x192": (0.130, 1.144, 5.485, 0.232, 0.831, 0.932, 0.968),
    f"{_P}mono_stereo_no_pretraining_640x192": (0.127, 1.031, 5.266, 0.221, 0.836, 0.943, 0.974),
    f"{_P}mono_baseline_640x192": (0.140, 1.610, 5.512, 0.223, 0.852, 0.946, 0.973),
    f"{_P}mono_no_minimum_reprojection_640x192": (0.117, 0.878, 4.846, 0.196, 0.870, 0.957, 0.980),
    f"{_P}mono_no_automasking_640x192": (0.120, 1.097, 5.074, 0.197, 0.872, 0.956, 0.979),
    f"{_P}mono_no_full_resolution_multiscale_640x192": (0.117, 0.866, 4.864, 0.196, 0.871, 0.957, 0.981),
    f"{_P}mono_predictive_mask_640x192": (0.123, 1.177, 5.210, 0.200, 0.869, 0.955, 0.978),
    f"{_P}mono_baseline_minimum_reprojection_640x192": (0.122, 1.081, 5.116, 0.199, 0.866, 0.957, 0.980),
    f"{_P}mono_baseline_automasking_640x192": (0.124, 0.936, 5.010, 0.206, 0.858, 0.952, 0.977),
    f"{_P}mono_baseline_full_resolution_multiscale_640x192": (0.124, 1.170, 5.249, 0.203, 0.865, 0.953, 0.978),
    f"{_P}mono_eigen_full_640x192": (0.116, 0.918, 4.872, 0.193, 0.874, 0.959, 0.981),
    f"{_P}mono_baseline_eigen_full_640x192": (0.146, 1.876, 5.666, 0.230, 0.848, 0.945, 0.972),
    "monodepth2_resnet50_kitti_mono_640x192": (0.110, 0.831, 4.642, 0.187, 0.883, 0.962, 0.982),
    f"{_P}mono_416x128": (0.128, 1.087, 5.171, 0.204, 0.855, 0.953, 0.978),
}
PUBLISHED = {name: dict(zip(_FIGURES, row, strict=True)) for name, row in _ROWS.items()}
"""Recipe -> metric -> the paper's value."""
_NOTES = {
    f"{_P}odometry_mono_640x192": "ATE 09: 0.017 ± 0.008 m, 10: 0.015 ± 0.010 m",
    # Spencer et al., "Deconstructing Self-Supervised Monocular Reconstruction", TMLR 2022: means of three seeds.
    "convnext_tiny_kitti_mono_640x192": "with stereo abs_rel 0.0998 (Spencer et al. 2022); not reproduced by md2",
    "convnext_tiny_kitti_mono_stereo_640x192": "abs_rel 0.0998 (Spencer et al. 2022); not reproduced by md2",
    "hrnet_w18_kitti_mono_640x192": "with stereo abs_rel 0.1021 (Spencer et al. 2022); not reproduced by md2",
    "hrnet_w18_kitti_mono_stereo_640x192": "abs_rel 0.1021 (Spencer et al. 2022); not reproduced by md2",
    # Lyu et al., AAAI 2021.
    "hrdepth_resnet18_kitti_mono_640x192": "abs_rel 0.109, rmse 4.632 (Lyu et al. 2021); not reproduced by md2",
    # Guizilini et al., "3D Packing for Self-Supervised Monocular Depth Estimation", CVPR 2020.
    f"{_P}mono_velocity_640x192": "abs_rel 0.111 with PackNet (Guizilini et al. 2020); not reproduced by md2",
    # He et al., "RA-Depth: Resolution Adaptive Self-Supervised Monocular Depth Estimation", ECCV 2022.
    f"{_P}mono_crop_640x192": "abs_rel 0.096 with an HRNet and more (RA-Depth 2022); not reproduced",
}


@dataclass(frozen=True)
class Recipe:
    """One recipe of `md2/configs/`.

    Attributes:
        name: its name in `md2 train NAME`.
        summary: first comment line of its file.
        config: resolved.
        published: metric name -> the paper's value; empty if the paper gives none.
        note: other published figures (odometry, other papers), and whether md2 has reproduced them.
    """

    name: str
    summary: str
    config: Config
    published: dict[str, float]
    note: str

    @property
    def prep_command(self) -> str:
        """The command that packs its data to the place where it reads them."""
        if self.name == "demo":
            return "make demo  # renders its drive, packs it, and trains this"
        folder = self.config.data.url.rsplit("/", 1)[-1]
        split, _, size = folder.rpartition("_") if folder.endswith(tuple("0123456789")) else (folder, "", "")
        motion = " --motion" if self.config.motion else ""
        return f"md2 prep --split {split}{motion}" + (f" --size {size} --out {self.config.data.url}" if size else "")

    @property
    def train_command(self) -> str:
        return f"md2 train {self.name}"


def zoo() -> list[Recipe]:
    """Return all recipes, by name."""
    return [
        Recipe(
            name,
            text.splitlines()[0].removeprefix("#").strip(),
            load_config(name),
            PUBLISHED.get(name, {}),
            _NOTES.get(name, ""),
        )
        for name, text in recipes().items()
    ]
