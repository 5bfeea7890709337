# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Cache the features of a frozen vision tower on disk. Cached images are not decoded again.

`<folder>/<tower>/*.safetensors` hold one tensor per image. The keys are content hashes of the tower (weights and
settings) and of the image file, so a different tower or a changed image never hits the cache.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Image, IterableDataset, List
from datasets.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file

from .images import image_key, open_image
from .output_files import atomic_path


IMAGES_PER_FILE = 1024
# Config keys that do not affect the computed features. The dtype is hashed with the weights.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "dtype", "processor_class", "transformers_version")


def tower_key(model, image_processor, mixed_precision: str) -> str:
    """Return a hash of the tower's weights, both configurations, the feature layers and the precision."""
    config = model.config
    settings = [
        config.vision_config.to_dict(),
        image_processor.to_dict(),
        config.vision_feature_layers,
        config.vision_feature_select_strategy,
        mixed_precision,
    ]
    for names in settings[:2]:
        for name in ORIGIN:
            names.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.base_model.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@functools.lru_cache(maxsize=64)
def _open(path: str):
    return safe_open(path, framework="pt")


class VisionFeatureCache:
    r"""
    Features of images on disk.

    Args:
        folder (`str`): folder of the caches of one or more towers.
        tower (`str`): key of this tower, from [`tower_key`].
    """

    def __init__(self, folder: str, tower: str):
        self.folder = Path(folder, tower)
        self.files: dict[str, str] = {}  # image key -> safetensors file
        self.refresh()

    def refresh(self) -> None:
        """Update the list of cached images from the files on disk."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self.files.update(dict.fromkeys(_open(str(path)).keys(), str(path)))

    def __getitem__(self, images: list[dict]) -> torch.Tensor:
        r"""
        Return the features of undecoded images, `(num_images, num_patches, vision_feature_size)`.

        Raises:
            `ValueError`: if the features of an image were not computed because its file changed.
        """
        keys = [image_key(image) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self.files:
                raise ValueError(
                    f"The image {image['path'] or key[:12]} has no features in {self.folder}: its file changed after "
                    "the run started. Start the run again to compute them."
                )
        if not keys:  # a batch without images: no features, with the shape of the others
            key, path = next(iter(self.files.items()))
            return _open(path).get_tensor(key)[None][:0]
        return torch.stack([_open(self.files[key]).get_tensor(key) for key in keys])

    def fill(self, dataset: Dataset | None, encode: Callable[[list], torch.Tensor], batch_size: int = 16) -> int:
        r"""
        Compute the missing features of the images of a dataset. An interrupted run resumes after the last file.

        The processes of a distributed run share the images and wait for each other. Each process must call this with
        the same dataset, and a folder that all processes can read.

        Args:
            dataset ([`~datasets.Dataset`]): rows with `images`. An image may occur in several rows.
            encode (`Callable`): function from RGB images to `(num_images, num_patches, vision_feature_size)`.
            batch_size (`int`, *optional*, defaults to 16): images per call of `encode`.

        Returns:
            `int`: number of computed images, of all processes.

        Raises:
            `ValueError`: if the disk has too little space for all features (raised before the first file is written),
                or a process cannot read the files of the others.
        """
        if dataset is None:
            return 0
        state, dataset = PartialState(), undecoded(dataset.select_columns("images"))
        missing = self._missing(dataset, range(state.process_index, len(dataset), state.num_processes))
        gathered = gather_object([missing])
        missing = {key: place for part in gathered for key, place in part.items()}
        keys = list(missing)[state.process_index :: state.num_processes]
        for start in tqdm(range(0, len(keys), IMAGES_PER_FILE), desc="Vision features", disable=not keys):
            features = {}
            of_file = keys[start : start + IMAGES_PER_FILE]
            for i in range(0, len(of_file), batch_size):
                batch = of_file[i : i + batch_size]
                positions = [missing[key] for key in batch]
                images = [dataset[index]["images"][number] for index, number in positions]
                batch_features = encode([open_image(image) for image in images])
                if start == i == 0:
                    self._require_room(len(missing), batch_features[0].nbytes)
                features.update(
                    {
                        key: tensor.clone(memory_format=torch.contiguous_format)
                        for key, tensor in zip(batch, batch_features.cpu(), strict=True)
                    }
                )
            self._write(features)
        state.wait_for_everyone()
        self.refresh()
        if missing.keys() - self.files.keys():
            raise ValueError(
                f"Some processes cannot read the features that others wrote to {self.folder}. Set a folder that all "
                "machines share, or compute the features on each machine with a single-process run."
            )
        return len(missing)

    def num_missing(self, dataset: Dataset) -> int:
        """Return the number of different images of a dataset without features."""
        dataset = undecoded(dataset.select_columns("images"))
        return len(self._missing(dataset, range(len(dataset))))

    def _missing(self, dataset: Dataset, indices: range) -> dict[str, tuple[int, int]]:
        """Return the row and the position in the row of each image without features."""
        missing: dict[str, tuple[int, int]] = {}
        for index in indices:
            for number, image in enumerate(dataset[index]["images"]):
                key = image_key(image)
                if key not in self.files:
                    missing.setdefault(key, (index, number))
        return missing

    def describe(self) -> str:
        """Return a summary: the number of cached images, and unused caches in the same folder."""
        others = [path for path in self.folder.parent.glob("*") if path.is_dir() and path != self.folder]
        lines = [f"Vision features of {len(self.files):,} images in {self.folder}"]
        if others:
            text = "another tower, image processor or precision"
            lines.append(f"  (not used: {len(others)} caches of {text} in {self.folder.parent})")
        return "\n".join(lines)

    def _require_room(self, num_images: int, image_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = num_images * image_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The features of {num_images:,} images need {needed / 1e9:.3g} GB, and {self.folder} has "
                f"{free / 1e9:.3g} GB free. Set a folder on a larger disk, or remove `cache_image_features`."
            )

    def _write(self, features: dict[str, torch.Tensor]) -> None:
        name = hashlib.sha256("".join(features).encode()).hexdigest()  # unique for these images
        path = self.folder / f"{name[:32]}.safetensors"
        with atomic_path(path) as draft:
            save_file(features, draft)


def undecoded(dataset):
    """
    Return a dataset, or a `dict` of datasets, with undecoded images, `{"path", "bytes"}`.

    Raises:
        `ValueError`: for a stream, whose images are unknown before they are read.
    """
    if dataset is None or isinstance(dataset, dict):
        return dataset and {name: undecoded(one) for name, one in dataset.items()}
    if isinstance(dataset, IterableDataset):
        raise ValueError("`cache_image_features` does not support streaming. Remove one of the two settings.")
    return dataset.cast_column("images", List(Image(decode=False)))
