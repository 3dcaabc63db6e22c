"""The labelled data sets that a backbone is transferred to: where they are, what they ask for.

They are those of the public benchmark of the authors (ELEVATER, image classification); which 18
sets the paper's own transfer table has is not known here. Names, splits and classes of TFDS are
those of tensorflow-datasets 4.9.
"""

import dataclasses

from esvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransferSet:
    """A data set with a training and a test split.

    Attributes:
      title: as people write it.
      place: as `config.data.name`; None where TFDS has no such set with labels for its test split,
        so that the user says where a folder of it is.
      train: the split to learn from and to choose on.
      test: the split to be judged on.
      metric: of `metrics.METRICS`.
      num_classes: there are; None for a set that is not in `SETS`.
    """

    title: str
    place: str | None
    train: str
    test: str
    metric: str
    num_classes: int | None


SETS = {
    "caltech101": TransferSet(
        "Caltech-101", "caltech101", "train", "test", "mean_per_class", 102
    ),
    "cars196": TransferSet("Stanford Cars", "cars196", "train", "test", "top1", 196),
    "cifar10": TransferSet("CIFAR-10", "cifar10", "train", "test", "top1", 10),
    "cifar100": TransferSet("CIFAR-100", "cifar100", "train", "test", "top1", 100),
    "country211": TransferSet("Country211", None, "train", "test", "top1", 211),
    "dtd": TransferSet("DTD", "dtd", "train+validation", "test", "top1", 47),
    # TFDS has one split of EuroSAT and RESISC45, in random order.
    "eurosat": TransferSet("EuroSAT", "eurosat/rgb", "train[:80%]", "train[80%:]", "top1", 10),
    "fer2013": TransferSet("FER2013", None, "train", "test", "top1", 7),
    # visual_domain_decathlon has 72-pixel images of it, and no test labels.
    "fgvc_aircraft": TransferSet("FGVC-Aircraft", None, "train", "test", "mean_per_class", 100),
    "food101": TransferSet("Food-101", "food101", "train", "validation", "top1", 101),
    "gtsrb": TransferSet("GTSRB", None, "train", "test", "top1", 43),
    "hateful_memes": TransferSet("Hateful Memes", None, "train", "test", "roc_auc", 2),
    # TFDS has KITTI's boxes, not the classes of distance that are made from them.
    "kitti_distance": TransferSet("KITTI distance", None, "train", "test", "top1", 4),
    "mnist": TransferSet("MNIST", "mnist", "train", "test", "top1", 10),
    "oxford_flowers102": TransferSet(
        "Oxford Flowers 102", "oxford_flowers102", "train+validation", "test", "mean_per_class", 102
    ),
    "oxford_iiit_pet": TransferSet(
        "Oxford Pets", "oxford_iiit_pet", "train", "test", "mean_per_class", 37
    ),
    "patch_camelyon": TransferSet(
        "PatchCamelyon", "patch_camelyon", "train+validation", "test", "top1", 2
    ),
    "rendered_sst2": TransferSet("Rendered SST2", None, "train", "test", "top1", 2),
    "resisc45": TransferSet("RESISC45", "resisc45", "train[:80%]", "train[80%:]", "top1", 45),
    "voc2007": TransferSet("VOC 2007", "voc/2007", "train+validation", "test", "map11", 20),
}  # fmt: skip


def named_set(text: str) -> tuple[str, TransferSet]:
    """The set that a user names, and its name.

    cifar10                     a set of the table, from TFDS
    gtsrb=folder:/data/gtsrb    a set of the table, from elsewhere: splits are train and test
    folder:/data/birds          any other, judged by top-1; splits are train and test

    Raises:
      UserError: the name before a place is none of the table's, or there is no name.
    """
    name, _, place = text.partition("=")
    if name not in SETS and place and ":" not in name:
        raise UserError(
            f"there is no set of the name {name!r}; any other set is written {place} alone",
            argument="text", value=text,
        )  # fmt: skip
    if not text:
        raise UserError("it names no set", argument="text", value=text)
    if name not in SETS:
        return text, TransferSet(text, text, "train", "test", "top1", None)
    if not place:
        return name, SETS[name]
    return name, dataclasses.replace(SETS[name], place=place, train="train", test="test")
