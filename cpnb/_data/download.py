"""Find the files of a data set: in ``CPNB_DATA``, in the cache, or on the network."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from cpnb._data.sources import SOURCES, Source
from cpnb._files import replacing

_TIMEOUT = 20  # seconds without an answer


def find_folder(name: str) -> Path:
    """Folder that holds all files of a data set, downloaded if need be.

    ``CPNB_DATA`` comes first and is never written to. Downloads go to the cache folder
    of the operating system; a file there is complete, and its hash was right.

    Args:
        name: Name of the data set.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a file is missing from ``CPNB_DATA``, or is nowhere and
            cannot be downloaded.
        ImportError: If a download is needed and pooch is missing.
        ValueError: If a download has the wrong hash.
    """
    source = SOURCES[name]
    # Not Path.expanduser, which gives up at a user that there is not.
    root = os.path.expanduser(os.environ.get("CPNB_DATA", "").strip())
    if not root:
        found = "CPNB_DATA is not set"
    elif not Path(root).is_dir():
        raise FileNotFoundError(
            f"CPNB_DATA is {root!r}, expected an existing folder. {source.where()}"
        )
    else:
        for folder in source.folders:
            if (path := Path(root) / folder).is_dir():
                if missing := _missing(path, source.files):
                    raise FileNotFoundError(
                        f"{path / missing[0]} is missing. {source.where()}"
                    )
                return path
        found = f"CPNB_DATA, which is {root}, has no {' or '.join(source.folders)}/"
    folder = _cache(source) / source.folders[-1]
    if _missing(folder, source.files):
        _download(source, folder, f"load_data({name!r}) finds no files: {found}")
    return folder


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [name for name in files if not (folder / name).is_file()]


def _cache(source: Source) -> Path:
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "pooch is missing, which downloads data sets. Install it with: python -m "
            f"pip install pooch. Or use files you have. {source.where()}"
        ) from error
    return Path(pooch.os_cache("cpnb"))


def _download(source: Source, folder: Path, found: str) -> None:
    """Fetch what is not there yet; a file appears once it is complete and checked."""
    import pooch
    from requests import RequestException

    for name, known_hash in source.downloads.items():
        url = source.url + name
        packed = name.endswith(".tar.gz")
        if not packed and (folder / name).is_file():
            continue
        try:
            pooch.retrieve(
                url,
                known_hash,
                fname=name,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=_TIMEOUT),
            )
        except RequestException as error:
            raise FileNotFoundError(
                f"{found}, and {url} cannot be downloaded ({type(error).__name__}). "
                f"Run again when it can, or use files you have. {source.where()}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{url} came truncated or changed: {error} Run again, or use files you "
                f"have. {source.where()}"
            ) from error
        if packed:
            _unpack(folder / name, folder, source.files)


def _unpack(archive: Path, folder: Path, files: Sequence[str]) -> None:
    """Write an archive's files, each complete or not at all, then remove it."""
    wanted = {Path(name).name: folder / name for name in files}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = wanted.get(Path(member.name).name)
            if path is None or (content := tar.extractfile(member)) is None:
                continue
            path.parent.mkdir(exist_ok=True)
            with content, replacing(path) as part, part.open("wb") as file:
                shutil.copyfileobj(content, file)
    archive.unlink()
