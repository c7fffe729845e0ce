"""Versions: of ascendit, in a module that imports nothing, and of installed packages."""

__version__ = "0.1.0"


def installed(*packages: str) -> dict[str, str]:
    """Versions from package metadata, nothing imported; absent packages are left out."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
