"""Find the image files of a folder: each file once, and no files that tools left there."""

import functools
import importlib
import os
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from bnpatch.core.errors import BnpatchError, first_line
from bnpatch.core.io import check_regular
from bnpatch.core.limits import MEGAPIXELS

#: Reasons why an image is left out.
BY_A_TOOL, A_LINK = "hidden or made by a tool", "a link to what is there already"

_TOOL_NAMES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "__pycache__", "lost+found"),
    *("$recycle.bin", "system volume information"),
    *("bnpatch-out", "alpha-curve.png"),  # results that an earlier run wrote among the images
}

# Suffixes of images that not every version of Pillow can read; such files are reported as unreadable.
_FOREIGN = {
    *(".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".exr", ".hdr", ".svg"),
    *(".dcm", ".dicom"),
}
# Suffixes of raw images of cameras: Pillow would read the preview in them, which is small.
_RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}

_DEEP_GRAY = 2  # a gray pixel of 16 or 32 bits counts as this many, because converting it takes longer
_COUNTED = 10_000  # the number of files of a tool's folder that are looked at to count its images

# Suffixes of files that are certainly no images, so that they need not be opened.
_NO_IMAGES = {
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".log", ".ini"),
    *(".py", ".ipynb", ".db", ".npy", ".npz", ".pt", ".pth", ".pkl", ".mat", ".zip", ".tar", ".gz", ".mp4"),
}
_STARTS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"\0\0\0\x0cjP  ", b"qoif"),
)
_FOREIGN_STARTS = (b"\0\0\0\x0cJXL ",)
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis"}

# Packages with which Pillow reads a format: module, function to call if an import is not enough, package.
_PLUGINS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", "register_heif_opener", "pillow-heif")),
    **dict.fromkeys((".avif", ".avifs"), ("pillow_avif", "", "pillow-avif-plugin")),
    ".jxl": ("pillow_jxl", "", "pillow-jxl-plugin"),
}


@dataclass
class FoundImages:
    """The image files that were found in a folder.

    Attributes:
        by_class: image files, at any depth, by name of the folder directly below the root; the root's own
            files under "". A folder that can't be listed is one of the paths, as an unreadable image.
        problems: by path of such a folder, why it can't be listed.
        left_out: by path below the root, why a file or folder was left out: :data:`BY_A_TOOL` or
            :data:`A_LINK`.
        images_left_out: number of images that were left out, by reason; of a tool's folder, among its first
            10,000 files.
    """

    by_class: dict[str, list[Path]] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    images_left_out: dict[str, int] = field(default_factory=dict)


def find_images(root: Path) -> FoundImages:
    """Find the image files of a folder.

    Links are followed, but every file counts once. Files and folders in place have precedence over links to
    them.

    Raises:
        BnpatchError: the folder itself can't be listed.
    """
    from timm.utils.misc import natural_key

    found = _Walk(root).found
    found.by_class = {
        name: sorted(paths, key=lambda path: natural_key(str(path)))
        for name, paths in sorted(found.by_class.items())
    }
    return found


def class_folders(root: Path) -> list[str]:
    """Name the folders in a folder that :func:`find_images` searches, with images or without.

    Raises:
        BnpatchError: the folder can't be listed.
    """
    real = os.path.realpath(root)
    names: list[str] = []
    seen: set[str] = set()
    for entry in sorted(_entries(root), key=lambda entry: (entry.is_symlink(), entry.name)):
        if is_by_a_tool(entry.name) or not _is_folder(entry):
            continue
        target = os.path.realpath(entry.path)
        if entry.is_symlink() and (target in seen or _within(real, target) or _is_walked(real, target)):
            continue
        seen.add(target)
        names.append(entry.name)
    return sorted(names)


def is_by_a_tool(name: str) -> bool:
    """Tell whether a file or folder of this name is hidden, or one that tools leave behind."""
    return name.startswith(".") or name.lower() in _TOOL_NAMES


def check_not_raw(path: Path) -> None:
    """Check that a file isn't the raw image of a camera, of which Pillow would read the small preview.

    Raises:
        OSError: the file has the suffix of a raw image.
    """
    if path.suffix.lower() in _RAW:
        raise OSError("the raw image of a camera, of which Pillow reads the preview only")


def open_image(path: Path) -> Image.Image:
    """Open an image file, without decoding it.

    Raises:
        OSError: the path is no file, or not one that Pillow can read; or it is the raw image of a camera, a
            PostScript program, or an image of too many pixels.
    """
    check_regular(path)
    check_not_raw(path)
    advice = register_plugin(path)
    if MEGAPIXELS.value > MEGAPIXELS.default:  # Pillow refuses more than twice this number
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, int(MEGAPIXELS.value * 5e5))
    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        if not advice:
            raise
        raise OSError(f"Pillow can't read it here ({advice})") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"{error} (the environment variable {MEGAPIXELS.name} sets it)") from error
    if image.format == "EPS":  # Ghostscript would run it
        raise OSError("a PostScript program, which can run without end")
    check_size(image, weight=_DEEP_GRAY if image.mode.startswith("I") else 1)
    return image


def check_size(image: Image.Image, weight: int = 1) -> None:
    """Check that an image has no more pixels than :data:`~bnpatch.core.limits.MEGAPIXELS` allows.

    Args:
        image: the image, which need not be decoded.
        weight: how many pixels each of its pixels counts for.

    Raises:
        OSError: it has more.
    """
    megapixels = image.width * image.height * weight / 1e6
    if megapixels > MEGAPIXELS.value:
        raise OSError(
            f"{megapixels:,.0f} megapixels, more than {MEGAPIXELS.value:,g} "
            f"(the environment variable {MEGAPIXELS.name} sets it)"
        )


def register_plugin(path: Path) -> str:
    """Make Pillow read the format of a file, if a package for the format is installed.

    Returns:
        The command that installs the package, as advice if the file still can't be read; or "".
    """
    plugin = _PLUGINS.get(path.suffix.lower())
    if plugin is None or path.suffix.lower() in _readable_suffixes():
        return ""
    _register(*plugin[:2])
    return f"pip install {plugin[2]}"


@functools.cache
def _register(module: str, function: str) -> None:
    try:
        plugin = importlib.import_module(module)
        if function:
            getattr(plugin, function)()
    except Exception:  # the package is missing or broken; the image is then reported as unreadable
        return


@functools.cache
def _suffixes() -> frozenset[str]:
    return _readable_suffixes() | _FOREIGN | _RAW


def _readable_suffixes() -> frozenset[str]:
    kinds = dict(Image.registered_extensions())  # a copy: another thread may register a format meanwhile
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN)


def _is_image(path: str) -> bool:
    """Tell whether a file is an image, by its suffix, or by its first bytes if the suffix doesn't tell."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _suffixes():
        return True
    if suffix in _NO_IMAGES:
        return False
    try:
        check_regular(Path(path))
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(_FOREIGN_STARTS) or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS):
            return True
        if start.startswith(_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
            with Image.open(path):
                return True
    except Exception:  # Pillow raises errors of many types for a file that only begins like an image
        return False
    return False


class _Walk:
    """Searches a folder: first folders in place, then folders behind links, then files behind links."""

    def __init__(self, root: Path) -> None:
        self.root, self.found = root, FoundImages()
        self.seen: set[str] = set()  # real paths of folders, then of files too that links lead to
        self.folder_links: deque[tuple[str, str, str]] = deque()  # path, real path of its folder, class
        self.file_links: list[tuple[str, str]] = []  # path, class
        real = os.path.realpath(root)
        self._descend(str(root), real, "", _entries(root))
        while self.folder_links:
            path, parent, kind = self.folder_links.popleft()
            target = os.path.realpath(path)
            if target in self.seen or _within(parent, target):
                self._leave_out(path, A_LINK, 0)
            else:
                self._descend(path, target, kind)
        for path, kind in sorted(self.file_links):
            self._follow(path, kind)

    def _descend(
        self, path: str, real: str, kind: str, entries: list[os.DirEntry[str]] | None = None
    ) -> None:
        """Search a folder and the folders in it; links are only recorded."""
        waiting = [(path, real, kind, entries)]
        while waiting:
            path, real, kind, entries = waiting.pop()
            self.seen.add(real)
            try:
                entries = list(os.scandir(path)) if entries is None else entries
            except OSError as error:
                self.found.problems[Path(path)] = f"a folder that can't be listed ({first_line(error)})"
                self._add(path, kind)
                continue
            at_root = path == str(self.root)
            for entry in sorted(entries, key=lambda entry: entry.name):
                inside = entry.name if at_root else kind
                if is_by_a_tool(entry.name):
                    self._leave_out(entry.path, BY_A_TOOL, _count(entry))
                elif not _is_folder(entry):
                    if entry.is_symlink():
                        self.file_links.append((entry.path, kind))
                    elif _is_image(entry.path):
                        self._add(entry.path, kind)
                elif entry.is_symlink():
                    self.folder_links.append((entry.path, real, inside))
                else:
                    waiting.append((entry.path, os.path.join(real, entry.name), inside, None))

    def _follow(self, path: str, kind: str) -> None:
        """Add the file that a link leads to."""
        if not _is_image(path):
            return
        target = os.path.realpath(path)
        folder, name = os.path.split(target)
        in_place = folder in self.seen and not is_by_a_tool(name) and os.path.exists(target)
        if target in self.seen or (in_place and _is_image(target)):
            self._leave_out(path, A_LINK, 1)
        else:
            self.seen.add(target)
            self._add(path, kind)

    def _add(self, path: str, kind: str) -> None:
        self.found.by_class.setdefault(kind, []).append(Path(path))

    def _leave_out(self, path: str, why: str, images: int) -> None:
        self.found.left_out[str(Path(path).relative_to(self.root))] = why
        if images or why == A_LINK:
            counts = self.found.images_left_out
            counts[why] = counts.get(why, 0) + images


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(root))
    except OSError as error:
        raise BnpatchError(f"cannot read the folder {root}: {first_line(error)}", "check the path") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example, a link to itself
        return False


def _within(folder: str, other: str) -> bool:
    """Tell whether ``folder`` is ``other`` or lies in it."""
    return folder == other or folder.startswith(other.rstrip(os.sep) + os.sep)


def _is_walked(root: str, target: str) -> bool:
    """Tell whether ``target`` lies below the root, and not in a folder that tools left there."""
    return _within(target, root) and not any(map(is_by_a_tool, Path(target).relative_to(root).parts))


def _count(entry: os.DirEntry[str]) -> int:
    """Return how many files have the suffix of an image: the entry itself, or those in the folder."""
    suffixes = _suffixes()
    if not _is_folder(entry):
        return int(os.path.splitext(entry.name)[1].lower() in suffixes)
    if entry.is_symlink():
        return 0
    names = (name for _, _, names in os.walk(entry.path) for name in names)
    return sum(os.path.splitext(name)[1].lower() in suffixes for name in islice(names, _COUNTED))
