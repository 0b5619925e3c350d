"""A tiny PET, and structures whose energies a pair potential says."""

import ase
import numpy as np
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator

# Three thousand parameters.
TINY = {
    "cutoff": 3.0,
    "d_pet": 8,
    "d_head": 8,
    "d_node": 8,
    "d_feedforward": 8,
    "num_heads": 2,
    "num_attention_layers": 1,
}
OWN_ENERGIES = {1: -13.0, 6: -1030.0, 8: -2040.0}


def make_structure(seed: int) -> ase.Atoms:
    random = np.random.default_rng(seed)
    count = 1 + seed % 7
    grid = np.stack(np.meshgrid(*[range(2)] * 3), -1).reshape(-1, 3)[:count] * 1.4
    positions = grid + random.normal(scale=0.1, size=(count, 3))
    periodic = seed % 3 == 0
    cell = np.diag([3.1, 3.4, 3.7]) + random.normal(scale=0.1, size=(3, 3))
    numbers = random.choice([1, 6, 8], size=count)
    atoms = ase.Atoms(numbers, positions, cell=cell if periodic else None, pbc=periodic)
    atoms.calc = MorsePotential(r0=1.4, epsilon=1.0, rho0=4.0, rcut1=2.4, rcut2=2.9)
    results = {
        "energy": atoms.get_potential_energy() + sum(OWN_ENERGIES[n] for n in numbers),
        "forces": atoms.get_forces(),
    }
    # Upstream wants the stress of all structures, where it wants any.
    results["stress"] = atoms.get_stress() if periodic else np.full(6, np.nan)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms
