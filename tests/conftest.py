import keras
import pytest

# Before the backend starts: two devices for the tests of distributed training.
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
elif keras.backend.backend() == "jax":
    import jax

    jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def _seeded():
    # Collecting garbage takes a second, and Python does it by itself.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
