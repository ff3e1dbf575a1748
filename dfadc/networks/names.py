"""Architecture names -> modules: torchvision, timm, smp, a user's own factory, and our networks."""

from __future__ import annotations

import contextlib
import difflib
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import nn

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.architecture_name import ArchitectureName, library_form, split_arguments
from dfadc.networks.construct import (
    WeightsOnMeta,
    construct,
    import_smp,
    import_timm,
    torchvision_classifiers,
    torchvision_segmenters,
)
from dfadc.networks.factory import names_in_file
from dfadc.networks.published_config import timm_fields
from dfadc.networks.stems import Stem, adapt_channels_, apply_pooled_stem_, apply_small_stem_
from dfadc.networks.user_code import running_user_code
from dfadc.networks.zoo import NETWORKS, SEGMENTERS, find_network
from dfadc.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Names as the field writes them -> names as torchvision does.
ALIASES = {"mobilenetv2": "mobilenet_v2", "mobilenetv3": "mobilenet_v3_large", "shufflenetv2": "shufflenet_v2_x1_0"}

#: With their pretrained weights torchvision builds these to turn ImageNet's normalisation into mean and std 0.5; ours
#: are built without that step, so their images are normalised with 0.5 right away.
RENORMALISING = ("googlenet", "inception_v3")

_SHOWN = 6

#: Libraries whose networks all run on the meta device; others' code may read numbers back from tensors.
KNOWN_ON_META = ("own", "torchvision")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A freshly initialised network.

    Args:
        module: images (N, C, H, W) -> its outputs, in training mode.
        name: canonical name; building it again gives the same layers.
        stem: what was built, which is ``default`` where no small stem is known.
        notes: what was adapted, for the user.
    """

    module: nn.Module
    name: str
    stem: Stem
    notes: tuple[str, ...] = ()


def training_only_prefixes(canonical: str) -> tuple[str, ...]:
    """Prefixes of torchvision's auxiliary classifiers, which only training uses; they are not built."""
    known = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
    library, _, name = canonical.partition(":")
    if library == "torchvision" and name in torchvision_segmenters():
        return ("aux_classifier.",)
    return known.get(canonical, ())


def resolve_architecture(written: str) -> ArchitectureName:
    """Finds out the library and the name that a text means, without building anything.

    Bare names are looked up among our own networks first, then in torchvision, then in timm where it is installed;
    ``ResNet-18`` is ``resnet18``. Arguments may follow in parentheses.

    Raises:
        DfadcError: nobody knows the name; the hint gives the nearest ones.
        RequirementMissing: a timm or smp name where that package is not installed.
    """
    name, arguments = split_arguments(written)
    found = _resolve_plain(library_form(name))
    return replace(found, arguments=arguments)


def _resolve_plain(name: str) -> ArchitectureName:
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "torchvision":
        if known := _spelling(rest, _torchvision_names().__contains__):
            return ArchitectureName("torchvision", known)
        raise _unknown(name, _torchvision_names(), rest)
    if colon and prefix == "timm":
        timm = import_timm()
        # A tag such as resnet18.a1_in1k chooses weights, which are never fetched.
        if known := _spelling(rest, timm.is_model):
            return ArchitectureName("timm", known)
        raise _unknown(name, timm.list_models(), rest)
    if colon and prefix == "smp":
        return ArchitectureName("smp", _known_to_smp(rest))
    if colon and prefix in ("hf-hub", "hf_hub"):
        raise DfadcError(f"{name} would be downloaded", "nothing is: give the folder of the downloaded repository")
    if colon:
        return ArchitectureName("factory", name)
    if name.endswith(".py"):
        known = " | ".join(f"{name}:{each}" for each in names_in_file(Path(name))[:_SHOWN])
        raise DfadcError(
            f"{name} is a file, not an architecture", f"name the class or function in it: {known or name + ':NAME'}"
        )
    return _resolve_bare(name)


def _resolve_bare(name: str) -> ArchitectureName:
    """A name without a library before it."""
    for spelling in _spellings(name):
        if find_network(spelling) is not None:
            return ArchitectureName("own", spelling)
        bare = ALIASES.get(spelling, spelling)
        if bare in _torchvision_names():
            return ArchitectureName("torchvision", bare)
    with contextlib.suppress(RequirementMissing):
        if known := _spelling(name, import_timm().is_model):
            return ArchitectureName("timm", known)
    raise _unknown(name, [*NETWORKS, *SEGMENTERS, *ALIASES, *_torchvision_names()], name)


def _spelling(name: str, is_known: Callable[[str], bool]) -> str | None:
    """The first spelling of a name that is known."""
    return next((each for each in _spellings(name) if is_known(each)), None)


def _spellings(name: str) -> tuple[str, ...]:
    """A name as it is, in small letters, and with the separators that libraries use or none."""
    small = name.lower()
    forms = (name, small, small.replace("-", "_"), small.replace("-", ""), re.sub(r"[-_]", "", small))
    return tuple(dict.fromkeys(forms))


def build_architecture(
    name: str, contract: ImageContract, *, stem: Stem = "default", device: str = "cpu"
) -> Architecture:
    """Builds a network with random weights for the contract's channels, size and classes.

    Args:
        name: as :func:`resolve_architecture` takes it.
        contract: the images and classes to build for.
        stem: ``small`` removes early strides until the total stride is 8, ``pooled`` that of a large first kernel;
            our own networks and the user's factories are built as they are.
        device: ``cpu``, or ``meta`` for shapes without weights; it is built on the CPU where its code does not bear
            that device.

    Raises:
        DfadcError: the name is unknown, or the network cannot be built for this contract.
    """
    resolved = resolve_architecture(name)
    notes: list[str] = []
    with torch.device(device) if device != "meta" else nullcontext():
        module = _construct_on_meta(resolved, contract) if device == "meta" else construct(resolved, contract)
        if resolved.library == "torchvision" and adapt_channels_(module, contract.channels):
            notes.append(f"first convolution takes {contract.channels} channels")
        if stem != "default":
            apply_ = apply_small_stem_ if stem == "small" else apply_pooled_stem_
            has_stems = resolved.library in ("torchvision", "timm")
            note = apply_(module, contract.channels) if has_stems else None
            notes.append(note or f"no {stem} stem known for {resolved.canonical}: default stem")
            stem = "default" if note is None else stem
    return Architecture(module, resolved.canonical, stem, tuple(notes))


def _construct_on_meta(resolved: ArchitectureName, contract: ImageContract) -> nn.Module:
    """A network without weights; with weights where its code reads numbers back from tensors, which have none there.

    A factory's code runs on the CPU alone: on the meta device it warns, and networks at its module's level fail.
    """
    if resolved.library == "factory":
        return construct(resolved, contract)
    try:
        with running_user_code(f"{resolved.canonical} cannot be built without weights"), WeightsOnMeta():
            return construct(resolved, contract).to("meta")
    except DfadcError:
        if resolved.library in KNOWN_ON_META:
            raise
    return construct(resolved, contract)


def documented_contract(name: str) -> ContractFields:
    """Contract that the architecture's library documents for its own pretrained weights; nothing is downloaded.

    Empty for our networks, factories, and torchvision networks without weights.
    """
    resolved = resolve_architecture(name)
    if resolved.library == "torchvision":
        weights = torchvision.models.get_model_weights(resolved.name)
        default = getattr(weights, "DEFAULT", None)
        if default is None:
            return ContractFields()
        transforms = default.transforms()
        resized = getattr(transforms, "resize_size", None)
        crop = getattr(transforms, "crop_size", None) or resized
        side = None if not crop else int(crop[0])
        mean, std = transforms.mean, transforms.std
        if resolved.name in RENORMALISING:
            mean = std = (0.5, 0.5, 0.5)
        categories = tuple(str(category) for category in default.meta["categories"])
        return ContractFields(
            input_size=None if side is None else (3, side, side),
            num_classes=len(categories),
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            # Some of torchvision's lists repeat a name, which is no harm.
            class_names=categories,
            preprocessing=None
            if side is None or not resized
            else Preprocessing(crop_share=side / int(resized[0]), interpolation=transforms.interpolation.value),
        )
    if resolved.library == "timm":
        documented = import_timm().get_pretrained_cfg(resolved.name, allow_unregistered=True)
        if documented is None or not documented.input_size:
            return ContractFields()
        return replace(timm_fields(asdict(documented)), num_classes=int(documented.num_classes) or None)
    return ContractFields()


def _torchvision_names() -> tuple[str, ...]:
    return (*torchvision_classifiers(), *torchvision_segmenters())


def _known_to_smp(name: str) -> str:
    """``Unet:resnet18`` as it is."""
    smp = import_smp()
    decoder, _, encoder = name.partition(":")
    if decoder.lower() not in smp.MODEL_ARCHITECTURES_MAPPING:
        raise _unknown(f"smp:{name}", list(smp.MODEL_ARCHITECTURES_MAPPING), decoder.lower())
    # timm's own names alone: it would fetch "hf-hub:..." and read "local-dir:...".
    is_of_timm = encoder.startswith("tu-") and import_timm().is_model(encoder.removeprefix("tu-"))
    if encoder not in smp.encoders.get_encoder_names() and not is_of_timm:
        raise _unknown(f"smp:{name}", smp.encoders.get_encoder_names(), encoder)
    return name


def _unknown(name: str, known: Sequence[str], wanted: str) -> DfadcError:
    nearest = difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    return DfadcError(f"unknown architecture {name!r}", f"{hint}`dfadc students` lists the names")
