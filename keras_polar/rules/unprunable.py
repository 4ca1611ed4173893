"""Operations without a rule of their own, each with the reason: units in front of them stay.

Together with the registered rules this list is complete for the Keras it was written against:
`tests/rules/test_registry.py` fails when a layer or operation is in neither.
"""

from typing import Any

from keras import layers

from keras_polar.graph.keras_private import op_class
from keras_polar.rules.custom import TracedPinRule
from keras_polar.rules.registry import add, find
from keras_polar.rules.rule import PinRule

LAYERS = {
    "is an abstract base class": "Wrapper StackedRNNCells InputLayer",
    "its function is Python code that cannot be read": "Lambda",
    "wraps a model of another framework": "FlaxLayer JaxLayer TFSMLayer TorchModuleWrapper",
    "is a cell, not a layer to be called on tensors": "LSTMCell GRUCell SimpleRNNCell",
    "reads categories or text": "CategoryEncoding Discretization HashedCrossing Hashing "
    "IntegerLookup StringLookup TextVectorization",
    "reads sound": "MelSpectrogram STFTSpectrogram",
    "reads bounding boxes": "MaxNumBoundingBoxes",
    "is a chain of preprocessing layers": "Pipeline",
    "mixes or changes the colours of images": "AugMix AutoContrast "
    "ContrastLimitedAdaptiveHistogramEqualization CutMix Equalization MixUp RandAugment "
    "RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast RandomErasing "
    "RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPosterization "
    "RandomSaturation RandomSharpness Solarization",
    "moves pixels in ways that are not followed": "RandomElasticTransform RandomPerspective "
    "RandomShear",
}

OPS = {
    "runs a Python function that cannot be read": "Map Scan AssociativeScan Switch WhileLoop "
    "ForiLoop Cond VectorizedMap",
    "writes or reads at computed places": "Scatter ScatterUpdate Slice SliceUpdate SearchSorted "
    "UnravelIndex IsIn Digitize",
    "groups, counts or lists values": "SegmentReduction Bincount Histogram Nonzero Unique InTopK "
    "OneHot MultiHot Size Ndim",
    "mixes all elements, samples included": "Ravel Outer Vdot Kron Vstack Vsplit AllClose Select",
    "takes or makes diagonals": "Diag Diagflat Diagonal Trace Vander",
    "makes a tensor of its own": "Arange Linspace Logspace Geomspace Meshgrid Full EmptyLike View",
    "is defined for vectors of a fixed length": "Cross",
    "computes statistics between units": "Corrcoef Correlate Trapezoid CDist",
    "transforms signals": "ExtractSequences FFT FFT2 IFFT2 RFFT IRFFT STFT ISTFT ViewAsComplex "
    "ViewAsReal",
    "is linear algebra on whole matrices": "Cholesky CholeskyInverse Det Eig Eigh Inv LuFactor Qr "
    "Solve SolveTriangular SVD Lstsq MatrixRank Pinv JVP Logdet Slogdet",
    "reads colours": "RGBToGrayscale RGBToHSV HSVToRGB SSIM PSNR",
    "moves pixels in ways that are not followed": "AffineTransform MapCoordinates "
    "PerspectiveTransform GaussianBlur ElasticTransform ScaleAndTranslate SobelEdges Unfold Fold",
    "compares with targets": "CategoricalCrossentropy SparseCategoricalCrossentropy CTCLoss "
    "CTCDecode",
    "takes its arguments in the wrong order in Keras 3.15; use the layer": "ConvTranspose",
    "works with a fixed batch only; write it as reshape and transpose": "Rearrange",
}

# What computes products that nobody counts. All others move, compare or look up values, or act on
# each element alone.
UNCOUNTED = frozenset(
    (
        "Wrapper FlaxLayer JaxLayer TFSMLayer TorchModuleWrapper Pipeline Map Scan "
        "AssociativeScan Switch WhileLoop ForiLoop Cond VectorizedMap Vdot Cross Corrcoef "
        "Correlate CDist Vander FFT FFT2 IFFT2 RFFT IRFFT STFT ISTFT Cholesky CholeskyInverse Det "
        "Eig Eigh Inv LuFactor Qr Solve SolveTriangular SVD Lstsq MatrixRank Pinv JVP Logdet "
        "Slogdet SSIM PSNR GaussianBlur SobelEdges ConvTranspose"
    ).split()
)
# Layers whose call shows what they compute.
TRACED = frozenset(
    "Lambda LSTMCell GRUCell SimpleRNNCell MelSpectrogram STFTSpectrogram StackedRNNCells".split()
)


def classes(table: dict[str, str], look_up: Any) -> dict[type, str]:
    """Class -> reason, for the classes that this version of Keras has."""
    named = {name: why for why, names in table.items() for name in names.split()}
    reasons = {}
    for name, why in named.items():
        try:
            reasons[look_up(name)] = why
        except AttributeError:  # of a newer Keras
            continue
    return reasons


PINNED = {
    **classes(LAYERS, lambda name: getattr(layers, name)),
    **classes(OPS, op_class),
}

for _class, _why in PINNED.items():
    if find(_class) is None:
        _name = _class.__name__
        _rule = TracedPinRule(_why) if _name in TRACED else PinRule(_why, _name not in UNCOUNTED)
        add(_rule, _class)
