import keras
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Before TensorFlow starts: two logical devices for the tests of tf.distribute.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def _seeded():
    # Collecting garbage takes a second, and Python does it by itself.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
