"""One rank of a test: runs a function of a test file in a process of its own (see the fixture `ranks`)."""

import importlib.util
import pickle
import sys


def main(source: str, function: str, arguments: str, result: str) -> None:
    spec = importlib.util.spec_from_file_location("test_under_ranks", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(arguments, "rb") as file:
        given = pickle.load(file)
    value = getattr(module, function)(*given)
    with open(result, "wb") as file:
        pickle.dump(value, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
