# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The frozen tower's features of every image, computed once and kept on disk: a image is not even decoded again.

`<folder>/<tower>/*.safetensors` hold tensors named by the images' content. The name of the tower is a hash of all
that its features depend on, so those of another tower are never found; a image is found by its bytes, so a changed
file is not found either.
"""

import functools
import hashlib
import json
import os
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


IMAGES_PER_FILE = 1024
# What a configuration says of its origin or gets by being saved; the weights' dtype is hashed with the weights.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "dtype", "processor_class", "transformers_version")


def tower_key(model, image_processor, mixed_precision: str) -> str:
    """Hash of what the features depend on: the tower's weights, both configurations, layers and precision."""
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
        folder (`str`): may hold the caches of several towers.
        tower (`str`): the name of this one's, from [`tower_key`].
    """

    def __init__(self, folder: str, tower: str):
        self.folder = Path(folder, tower)
        self.files: dict[str, str] = {}  # of each image: the file that holds it
        self.refresh()

    def refresh(self) -> None:
        """Learns what is on disk."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self.files.update(dict.fromkeys(_open(str(path)).keys(), str(path)))

    def __getitem__(self, images: list[dict]) -> torch.Tensor:
        r"""
        `(num_images, num_patches, vision_feature_size)` of images that are not decoded.

        Raises:
            `ValueError`: for a image whose features were not computed: its file has changed since.
        """
        keys = [image_key(image) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self.files:
                raise ValueError(
                    f"The image {image['path'] or key[:12]} has no features in {self.folder}: its file has changed "
                    "since the run began. Start again, and the new one is computed."
                )
        if not keys:  # of a batch without images: their shape alone
            key, path = next(iter(self.files.items()))
            return _open(path).get_tensor(key)[None][:0]
        return torch.stack([_open(self.files[key]).get_tensor(key) for key in keys])

    def fill(self, dataset: Dataset | None, encode: Callable[[list], torch.Tensor], batch_size: int = 16) -> int:
        r"""
        Computes what is missing; a run that was killed here goes on after the last whole file.

        The processes of a distributed run share the work, evenly and without a image twice, and all of them wait for
        the last: each calls this with the same dataset, and the folder is one that all of them see.

        Args:
            dataset ([`~datasets.Dataset`]): its images are wanted; the same one may come many times.
            encode (`Callable`): decoded images to features `(num_images, num_patches, vision_feature_size)`.
            batch_size (`int`, *optional*, defaults to 16): images that the tower gets at once.

        Returns:
            `int`: how many images were computed.

        Raises:
            `ValueError`: when the disk has no room for all of them, before the first file, and when a process does not
                see what the others wrote.
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
                places = [missing[key] for key in batch]
                images = [dataset[index]["images"][number] for index, number in places]
                found = encode([open_image(image) for image in images])
                if start == i == 0:
                    self._require_room(len(missing), found[0].nbytes)
                features.update(
                    {
                        key: tensor.clone(memory_format=torch.contiguous_format)
                        for key, tensor in zip(batch, found.cpu(), strict=True)
                    }
                )
            self._write(features)
        state.wait_for_everyone()
        self.refresh()
        if missing.keys() - self.files.keys():
            raise ValueError(
                f"Not every process sees what the others wrote into {self.folder}: name a folder that all machines "
                "share, or fill it on each by a run on that machine alone."
            )
        return len(missing)

    def _missing(self, dataset: Dataset, indices: range) -> dict[str, tuple[int, int]]:
        """Of each image in those rows that has no features: its row, and its number there."""
        missing: dict[str, tuple[int, int]] = {}
        for index in indices:
            for number, image in enumerate(dataset[index]["images"]):
                key = image_key(image)
                if key not in self.files:
                    missing.setdefault(key, (index, number))
        return missing

    def describe(self) -> str:
        """One line for people, and one more when the folder holds what is not used."""
        others = [path for path in self.folder.parent.glob("*") if path.is_dir() and path != self.folder]
        lines = [f"Vision features of {len(self.files):,} images in {self.folder}"]
        if others:
            text = "of another tower, image processor or precision, and are not used"
            lines.append(f"  ({len(others)} other folders beside it are {text})")
        return "\n".join(lines)

    def _require_room(self, num_images: int, image_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = num_images * image_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The features of {num_images:,} images take {needed / 1e9:.3g} GB, and {self.folder} has "
                f"{free / 1e9:.3g} GB free: name a larger disk, or take `cache_image_features` out."
            )

    def _write(self, features: dict[str, torch.Tensor]) -> None:
        name = hashlib.sha256("".join(features).encode()).hexdigest()  # never that of other images
        path = self.folder / f"{name[:32]}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}")  # a file is there as a whole or not at all
        save_file(features, unfinished)
        os.replace(unfinished, path)


def undecoded(dataset):
    """
    A dataset, or a `dict` of several, with images as `{"path", "bytes"}`, by which the cache knows them.

    Raises:
        `ValueError`: for a stream, whose images are not known before.
    """
    if dataset is None or isinstance(dataset, dict):
        return dataset and {name: undecoded(one) for name, one in dataset.items()}
    if isinstance(dataset, IterableDataset):
        raise ValueError("`cache_image_features` needs a dataset that is not streamed: its images must be known.")
    return dataset.cast_column("images", List(Image(decode=False)))
