"""The config of `conftest.tiny_config` as a file, for processes that tests start."""

import conftest


def get_config():
    return conftest.tiny_config.__wrapped__()
