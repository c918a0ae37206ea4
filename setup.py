"Everything that this file needs to know stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['status']}",
        f"Intended Audience :: {cfg['audience']}",
        *(f"Programming Language :: Python :: {version}" for version in cfg["pythons"].split()),
    ],
    packages=find_packages(include=["dfcnn", "dfcnn.*"]),
    package_data={"dfcnn": ["targets.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "dask": cfg["dask_requirements"].split(),
        "docs": cfg["docs_requirements"].split(),
        "onnx": cfg["onnx_requirements"].split(),
        "timm": cfg["timm_requirements"].split(),
    },
)
