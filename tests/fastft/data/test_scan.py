import numpy as np

from fastft.data.scan import digest


def test_nested_fields_tell_samples_apart() -> None:
    """As weather has them: variables by kind."""
    lat = np.linspace(90, -90, 4, dtype=np.float32)

    def sample(value: float) -> dict:
        return {"lat": lat, "surf": {"2t": np.full((2, 3), value, np.float32)}, "levels": [500]}

    assert digest(sample(1.0), {}) == digest(sample(1.0), {})
    assert digest(sample(1.0), {}) != digest(sample(2.0), {})
    moved = {"lat": lat, "atmos": {"2t": np.full((2, 3), 1.0, np.float32)}}
    assert digest(sample(1.0), {}) != digest(moved, {})
