"""Classifies images with a .tflite file; needs numpy and ai-edge-litert, as on a Raspberry Pi.

    pip install numpy ai-edge-litert
    python classify.py small-int8.tflite photo.ppm --labels=labels.txt --scale=255

Images are .npy arrays of shape (height, width[, channels]) or (images, height, width, channels),
or binary .ppm and .pgm files; others are read with Pillow where it is installed. They are resized
to what the model takes (nearest pixel) and divided by `--scale`, which must be what the model was
trained with. int8 and float files alike; outputs may be probabilities or logits.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

PNM = re.compile(rb"P([56])\s+(?:#.*\n)*(\d+)\s+(\d+)\s+(\d+)\s")


# --- images ----------------------------------------------------------------------------------


def read_images(path):
    """Pixels of shape (images, height, width, channels)."""
    if path.suffix == ".npy":
        pixels = np.load(path)
    elif path.suffix in (".ppm", ".pgm"):
        pixels = read_pnm(path)
    else:
        pixels = read_with_pillow(path)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return pixels if pixels.ndim == 4 else pixels[None]


def read_pnm(path):
    content = path.read_bytes()
    header = PNM.match(content)
    if header is None or int(header[4]) > 255:
        raise SystemExit(f"{path}: expected a binary .ppm or .pgm file of 8 bits (P5 or P6).")
    width, height, channels = int(header[2]), int(header[3]), 3 if header[1] == b"6" else 1
    pixels = np.frombuffer(content, np.uint8, width * height * channels, header.end())
    return pixels.reshape(height, width, channels)


def read_with_pillow(path):
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit(
            f"{path}: expected .npy, .ppm or .pgm; for other formats `pip install pillow`."
        ) from None
    return np.asarray(Image.open(path).convert("RGB"))


def fitted(images, shape):
    """The images in the height, width and number of channels of the model."""
    _, height, width, channels = shape
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    images = images[:, rows][:, :, columns]
    if images.shape[-1] == channels:
        return images
    if channels == 1:
        return images.mean(-1, keepdims=True)
    if images.shape[-1] == 1:
        return np.repeat(images, channels, -1)
    raise SystemExit(f"The model takes {channels} channels, the image has {images.shape[-1]}.")


# --- the model -------------------------------------------------------------------------------


def stored(values, detail):
    """Real numbers as the tensor holds them."""
    dtype, (scale, zero_point) = detail["dtype"], detail["quantization"]
    if not scale:
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(dtype)


def real(values, detail):
    """The real numbers that a tensor stands for."""
    scale, zero_point = detail["quantization"]
    return (values.astype(np.float32) - zero_point) * scale if scale else values


def probabilities(outputs):
    """Outputs as they are if they are probabilities already, else their softmax."""
    if outputs.min() >= 0 and abs(outputs.sum() - 1) < 0.05:
        return outputs
    powers = np.exp(outputs - outputs.max())
    return powers / powers.sum()


def classify(interpreter, image):
    """Probabilities of the classes, and milliseconds."""
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(taken["index"], stored(image[None], taken))
    start = time.perf_counter()
    interpreter.invoke()
    milliseconds = 1000 * (time.perf_counter() - start)
    return probabilities(real(interpreter.get_tensor(given["index"])[0], given)), milliseconds


def main():
    """Prints label, confidence and milliseconds for every image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help=".tflite file")
    parser.add_argument("images", type=Path, nargs="+", help=".npy, .ppm, .pgm, ...")
    parser.add_argument("--labels", type=Path, help="text file, a label in each line")
    parser.add_argument("--scale", type=float, default=255.0, help="pixels are divided by this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    interpreter = Interpreter(str(options.model), num_threads=options.threads)
    interpreter.allocate_tensors()
    shape = interpreter.get_input_details()[0]["shape"]
    names = options.labels.read_text(encoding="utf-8").splitlines() if options.labels else None
    for path in options.images:
        for image in fitted(read_images(path), shape) / options.scale:
            found, milliseconds = classify(interpreter, image)
            best = int(found.argmax())
            label = names[best] if names else f"class {best}"
            print(f"{path.name}  {label}  {found[best]:.1%}  {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()
