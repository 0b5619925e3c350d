"""Data sets of metatrain's options files as those of a run file."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ase
import ase.io
from metatrain.utils.data.dataset import load_indices
from metatrain.utils.omegaconf import expand_dataset_config
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastft.adapters.pet.data import known_labels, label_of
from fastft.adapters.pet.options import TARGET
from fastft.errors import ConfigError, DataError, nearest

_OF_ENERGIES = {
    "quantity": "energy",
    "sample_kind": "system",
    "per_atom": False,
    "type": "scalar",
    "num_subtargets": 1,
}


@dataclass(frozen=True)
class Part:
    """One of upstream's data sets: structures of a file, with labels of one target or several.

    Attributes:
        where: in the options file.
        path: of the file.
        indices: of its structures.
        names: target -> label -> its name in the file; a label that there is.
        targets: as the options file has them, completed.
    """

    where: str
    path: str
    indices: Sequence[int]
    names: Mapping[str, Mapping[str, str]]
    targets: Mapping[str, Any]


@dataclass
class DataReader:
    """Reads the data sections of an options file, and the files that they name.

    Attributes:
        notes: what has no counterpart.
        frames: structures by file.
    """

    options: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    frames: dict[str, list[ase.Atoms]] = field(default_factory=dict)

    def splits(self) -> dict[str, list[Part]]:
        """The data sets of training, validation and test."""
        training = self._parts("training_set", self.options.get("training_set"))
        found: dict[str, list[Part]] = {"training": training}
        left = 1.0
        for split in ("validation", "test"):
            given = self.options.get(f"{split}_set", 0.0)
            if isinstance(given, (int, float)):
                if not 0 <= given < left:
                    raise ConfigError(
                        f"{split}_set: must be a share of the structures that leaves some for"
                        f" training; got {given}; lower it"
                    )
                share, left = given / left, left - given
                pairs = [_cut(part, share) for part in found["training"]]
                found["training"] = [part for part, _ in pairs]
                found[split] = [part for _, part in pairs]
                if given:
                    self.notes.append(
                        f"{split}_set: {given:g} of the structures are drawn at random by upstream;"
                        " here they are the last ones of each file, so shuffle a file whose order"
                        " matters, such as a trajectory"
                    )
            elif isinstance(given, dict) and set(given) == {"indices"}:
                chosen = self._indices(f"{split}_set", given["indices"], training[0].path)
                found[split] = [replace(training[0], where=f"{split}_set", indices=chosen)]
            else:
                found[split] = self._parts(f"{split}_set", given)
        if problems := dict.fromkeys(self._refused(found)):
            raise ConfigError(problems)
        self.notes += [
            f"{part.where}: has no structures with energies; left out"
            for split, each in found.items()
            for part in each
            if not (part.names and part.indices) and (part.indices or split == "training")
        ]
        return {
            split: [part for part in each if part.names and part.indices]
            for split, each in found.items()
        }

    def elements(self, parts: Sequence[Part]) -> list[int]:
        """Atomic numbers in data sets, sorted."""
        chosen = (self.frames[part.path][index] for part in parts for index in part.indices)
        return sorted({int(number) for atoms in chosen for number in atoms.numbers})

    def sources(
        self, parts: Sequence[Part], default: str, wanted: set[str]
    ) -> list[dict[str, Any]]:
        """The data sets as a run file has them: one for each target of a part.

        Args:
            default: the target that data sets need not name.
            wanted: labels that the run trains on.
        """
        made: list[dict[str, Any]] = []
        for part in parts:
            frames = self._frames_option(part)
            for target, names in part.names.items():
                # `virial` has no default name.
                options: dict[str, Any] = {
                    label: name
                    for label, name in names.items()
                    if name != label or label == "virial"
                }
                if frames != ":":
                    options["frames"] = frames
                if target != default:
                    options["target"] = target
                if lacks := sorted(wanted - labels(names)):
                    options["lacks"] = lacks
                made.append({"path": part.path} | ({"options": options} if options else {}))
        paths = [source["path"] for source in made]
        for number, source in enumerate(made):
            if paths.count(source["path"]) > 1:
                source["name"] = f"{source['path']} ({number + 1})"
        return made

    def _refused(self, found: Mapping[str, Sequence[Part]]) -> Iterator[str]:
        """What upstream refuses of data sets that it can read."""
        trained = {target for part in found["training"] for target in part.names}
        for part in (part for parts in found.values() for part in parts):
            frames = self.frames[part.path]
            for target, names in part.names.items():
                where, key = f"{part.where}.targets.{target}", names["energy"]
                if target not in trained:
                    yield (
                        f"{where}: must be a target of training_set; got others there,"
                        f" {', '.join(map(repr, sorted(trained)))}; write targets as there: a path"
                        " alone stands for 'energy'"
                    )
                elif part.targets[target]["read_from"] == part.path and any(
                    label_of(atoms, key) is None for atoms in frames
                ):
                    yield (
                        f"{where}.key: must be in every structure of {part.path}; got '{key}',"
                        f" which some lack{nearest(key, known_labels(frames, 'energy'))};"
                        " correct it"
                    )

    def _parts(self, where: str, given: Any) -> list[Part]:
        if given is None:
            raise ConfigError(f"{where}: must be there; got none; add it")
        try:
            listed = OmegaConf.to_container(
                expand_dataset_config(given if isinstance(given, str) else OmegaConf.create(given)),
                resolve=True,
            )
        except (ValueError, TypeError, OmegaConfBaseException) as error:
            raise ConfigError(
                f"{where}: must be a data set that metatrain reads; got {error}; correct it"
            ) from error
        assert isinstance(listed, list)
        several = len(listed) > 1
        return [
            self._part(f"{where}[{number}]" if several else where, each)
            for number, each in enumerate(listed)
        ]

    def _part(self, where: str, given: Any) -> Part:
        systems = given["systems"]
        path, unit = systems["read_from"], (systems["length_unit"] or "").lower()
        if unit not in ("", "a", "angstrom"):
            self.notes.append(
                f"{where}.systems.length_unit: must be angstrom here; got {unit}; convert the file"
            )
        if "extra_data" in given:
            self.notes.append(f"{where}.extra_data: has no counterpart")
        frames = self._read(path)
        indices: Sequence[int] = range(len(frames))
        if "indices" in given:
            indices = self._indices(where, given["indices"], path)
        names = {}
        for target, config in given.get("targets", {}).items():
            found = self._names(f"{where}.targets.{target}", target, config, path)
            if found:
                names[target] = found
        return Part(where, path, indices, names, given.get("targets", {}))

    def _names(self, where: str, target: str, config: Any, path: str) -> dict[str, str]:
        """Names of the labels of a target that the file has."""
        if not re.match(TARGET, target) or any(
            config.get(k, v) != v for k, v in _OF_ENERGIES.items()
        ):
            self.notes.append(
                f"{where}: has no counterpart, as only energies of whole structures have, 'energy'"
                " and its variants 'energy/...'; left out"
            )
            return {}
        names = {"energy": config["key"]}
        for label in ("forces", "stress", "virial"):
            gradient = config[label]
            if not gradient:
                continue
            if gradient["read_from"] != path:
                self.notes.append(
                    f"{where}.{label}.read_from: labels must be in the file of their structures;"
                    f" got {gradient['read_from']}; write them into {path}"
                )
            # As upstream, which goes on without where one structure lacks it.
            elif all(label_of(atoms, gradient["key"]) is not None for atoms in self.frames[path]):
                names[label] = gradient["key"]
            else:
                self.notes.append(
                    f"{where}.{label}: '{gradient['key']}' is not in every structure of {path}; as"
                    " by upstream, it is not trained on"
                )
        if config["read_from"] != path:
            self.notes.append(
                f"{where}.read_from: labels must be in the file of their structures; got"
                f" {config['read_from']}; write them into {path}"
            )
        return names

    def _read(self, path: str) -> list[ase.Atoms]:
        if path not in self.frames:
            try:
                frames = ase.io.read(path, ":")
            except Exception as error:
                raise DataError(
                    f"{path}: must be a file that ASE reads, to count its structures; got"
                    f" {type(error).__name__}: {error}; relative paths start at {Path.cwd()}"
                ) from error
            self.frames[path] = frames if isinstance(frames, list) else [frames]
        return self.frames[path]

    def _indices(self, where: str, given: Any, path: str) -> list[int]:
        try:
            indices = load_indices(given)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{where}.indices: must be indices or a file; got {error}") from error
        if indices and max(indices) >= len(self._read(path)):
            raise ConfigError(
                f"{where}.indices: must be below {len(self._read(path))}, the structures of {path};"
                f" got {max(indices)}; correct them"
            )
        return indices

    def _frames_option(self, part: Part) -> str:
        """A slice that takes the part's structures."""
        chosen, total = sorted(part.indices), len(self.frames[part.path])
        step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
        if chosen != list(range(chosen[0], chosen[-1] + 1, step)):
            self.notes.append(
                f"{part.where}.indices: a run file takes slices only, and these are none; all of"
                f" {part.path} is taken; write the structures into a file of their own"
            )
            return ":"
        start = "" if chosen[0] == 0 else str(chosen[0])
        end = "" if chosen[-1] + step >= total else str(chosen[-1] + 1)
        return f"{start}:{end}" + (f":{step}" if step > 1 else "")


def labels(names: Mapping[str, str]) -> set[str]:
    """Which of forces and stress these labels are."""
    return {"stress" if name == "virial" else name for name in names} - {"energy"}


def _cut(part: Part, share: float) -> tuple[Part, Part]:
    """A data set without its last structures, and these."""
    count = math.floor(len(part.indices) * share)
    first = len(part.indices) - count
    return (
        replace(part, indices=part.indices[:first]),
        replace(part, indices=part.indices[first:]),
    )
