"""`esvit embed`: write the features of every image to a file."""

import argparse

import jax
from absl import logging

from esvit_jax import checkpoint
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.embed import embed


def main(argv: list[str]) -> None:
    """`esvit embed`."""
    parser = argparse.ArgumentParser(
        prog="esvit embed", description="Writes the features of every image of a data set."
    )
    parser.add_argument("--workdir", required=True, help="of a run, or a converted checkpoint")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--data", help="as config.data.name (default: what the run trained on)")
    parser.add_argument("--data_dir", help="as config.data.data_dir (default: the run's)")
    parser.add_argument("--split", help="as in TFDS (default: train)")
    parser.add_argument("--out", required=True, help=".npz or .parquet file to make")
    parser.add_argument("--regions", action="store_true", help="write region features too")
    parser.add_argument("--batch_size", type=int, help="over all devices")
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)

    loaded = checkpoint.load_model(arguments.workdir, arguments.step)
    config = loaded.config
    config.data.name = arguments.data or config.data.name
    config.data.data_dir = arguments.data_dir or config.data.data_dir
    config.evaluate.batch_size = arguments.batch_size or config.evaluate.batch_size
    batch_size, devices = config.evaluate.batch_size, jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(f"--batch_size={batch_size}: {devices} devices cannot share that many")
    split = arguments.split or ("train" if arguments.data else config.data.train_split)
    source = open_source(config.data.name, split, config.data.data_dir or None)
    count = embed(loaded, source, arguments.out, regions=arguments.regions)
    print(f"features of {count} images: {arguments.out}")
