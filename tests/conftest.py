import keras
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    # Collecting garbage takes a second, and Python does it by itself.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
