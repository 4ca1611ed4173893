"""The example that reads ImageNet weights which were stored with PyTorch."""

import pickle

import keras
import numpy as np
import pytest
from test_examples import EXAMPLES


@pytest.fixture
def pretrained(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pretrained

    return pretrained


def test_file_of_old_pytorch_is_read_without_it(pretrained, tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"turned": whole.permute(2, 0, 1), "part": whole[1], "count": torch.tensor(7)}
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = pretrained.read_tensors(tmp_path / "old.pth")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(read[name], tensor.numpy())


def test_file_that_would_run_code_is_refused(pretrained, tmp_path):
    parts = (0, 1001, {}, {"weight": print})
    (tmp_path / "bad.pth").write_bytes(b"".join(map(pickle.dumps, parts)))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        pretrained.read_tensors(tmp_path / "bad.pth")


def test_pretrained_network_knows_a_flower(pretrained):
    pytest.importorskip(pretrained.PACKAGE)
    from sklearn.datasets import load_sample_image

    image = load_sample_image("flower.jpg")
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = np.float32(image[top : top + side, left : left + side])
    image = keras.ops.image.resize(square, pretrained.SHAPE[:2], "bicubic", antialias=True)
    network = pretrained.efficientnet_lite0()
    assert network.count_params() == 4_694_024  # with the moving statistics: 42,016 of them
    logits = network(pretrained.normalise(image)[None])
    assert keras.ops.argmax(logits[0]) == 985  # "daisy"
