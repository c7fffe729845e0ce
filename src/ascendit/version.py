"""Versions of ascendit and of installed packages. Imports nothing at module level."""

__version__ = "0.1.0"


def installed(*packages: str) -> dict[str, str]:
    """Package -> version from package metadata, without importing it; absent packages are omitted."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def versions() -> dict[str, str]:
    """Versions of Python, ascendit and its main libraries, read without importing them."""
    import platform

    packages = ("torch", "diffusers", "transformers")
    libraries = dict.fromkeys(packages, "not installed") | installed(*packages)
    return {"python": platform.python_version(), "ascendit": __version__, **libraries}
