"""Packaging: everything that can be set lies in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
ini = config["DEFAULT"]

setup(
    name=ini["lib_name"],
    version=ini["version"],
    license="MIT",
    description=ini["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=ini["author"],
    author_email=ini["author_email"],
    url=ini["git_url"],
    keywords=ini["keywords"],
    packages=find_packages(include=["minigpt", "minigpt.*"]),
    include_package_data=True,
    python_requires=f">={ini['min_python']}",
    install_requires=ini["requirements"].split(),
    extras_require={"dev": ini["dev_requirements"].split()},
    entry_points={"console_scripts": ini["console_scripts"].split("\n")},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "License :: OSI Approved :: MIT License",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
    ],
    zip_safe=False,
)
