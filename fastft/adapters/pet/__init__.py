"""PET (github.com/metatensor/metatrain): potentials of atoms, from upstream's own package."""

from fastft.adapters.pet.adapter import PetAdapter
from fastft.adapters.pet.options import PetLossOptions, PetOptions

__all__ = ["PetAdapter", "PetLossOptions", "PetOptions"]
