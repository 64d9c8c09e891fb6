"""Where each data set comes from: official files, their hashes, classes, licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AGAIN = "Get the official file again (in the cache: delete it, then run again)."

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
    bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
    cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
    girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
    palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit
    raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)


@dataclass(frozen=True)
class Source:
    """One data set as its makers publish it.

    Attributes:
        classes: Name of each class.
        licence: Licence and whom to cite.
        folders: Subfolders of ``CPNB_DATA`` to look into, in this order; the last is
            also that of the cache.
        files: What the subfolder holds.
        url: Where the downloads are, with a slash at the end.
        downloads: Name and hash of each file there; a ``.tar.gz`` is unpacked.
        hint: What to try instead.
    """

    classes: tuple[str, ...]
    licence: str
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    url: str = ""
    downloads: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""

    def where(self) -> str:
        """Sentence that says where the files belong."""
        return (
            f"Set CPNB_DATA to a folder whose subfolder {self.folders[0]}/ holds the "
            f"official file{'s' * (len(self.files) > 1)} {', '.join(self.files)}."
            f"{self.hint}"
        )


def _idx(hashes: tuple[str, ...], **about: object) -> Source:
    """Four gzipped idx files: training images and labels, test images and labels."""
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    return Source(files=names, downloads=dict(zip(names, hashes, strict=True)), **about)


_SVHN = "non-commercial use; cite Netzer, Wang, Coates, Bissacco, Wu, Ng 2011"
SOURCES = {
    "digits": Source(
        _DIGITS, "CC BY 4.0 (UCI, doi:10.24432/C50P49), copy in scikit-learn"
    ),
    "mnist": _idx(
        (
            "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "md5:9fb629c4189551a2d022fa330f9573f3",
            "md5:ec29112dd5afa0611ce80d1b7f02629c",
        ),
        classes=_DIGITS,
        licence="cite LeCun, Bottou, Bengio, Haffner 1998",
        folders=("mnist",),
        # A mirror: the authors' own address no longer serves the files.
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion_mnist": _idx(
        (
            "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "md5:25c81989df183df01b3e8a0aad5dffbe",
            "md5:bef4ecab320f06d8554ea6380940ec79",
            "md5:bb300cfdad3c16e7a12a480ee83cd310",
        ),
        classes=_CLOTHES,
        licence="MIT, Zalando SE 2017; cite Xiao, Rasul, Vollgraf 2017",
        folders=("fashion_mnist",),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "cifar10": Source(
        _CIFAR10,
        "no licence stated; cite Krizhevsky 2009",
        folders=("cifar10",),
        files=(
            *(f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6)),
            "cifar-10-batches-bin/test_batch.bin",
        ),
        url="https://www.cs.toronto.edu/~kriz/",
        downloads={"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "cifar100": Source(
        _CIFAR100,
        "no licence stated; cite Krizhevsky 2009",
        folders=("cifar100",),
        files=("cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
        url="https://www.cs.toronto.edu/~kriz/",
        downloads={"cifar-100-binary.tar.gz": "md5:03b5dce01913d631647c71ecec9e9cb8"},
    ),
    "svhn": Source(
        _DIGITS,
        _SVHN,
        folders=("svhn",),
        files=("train_32x32.mat", "test_32x32.mat"),
        url="http://ufldl.stanford.edu/housenumbers/",
        downloads={
            "train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "md5:eb5a983be6a315427106f1b164d9cef3",
        },
        hint=' A sample of it is the data set "svhn_first_1083".',
    ),
    "svhn_first_1083": Source(
        _DIGITS,
        f"{_SVHN}; only the first 1,083 training crops",
        folders=("svhn-first-1083", "svhn"),
        files=("train_32x32.mat",),
        url="http://ufldl.stanford.edu/housenumbers/",
        downloads={"train_32x32.mat": "md5:e26dedcc434d2e4c54c9b2d4a06d8373"},
    ),
}
