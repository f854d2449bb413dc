"""Packaging: everything that can be set lies in settings.ini."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
ini = config["DEFAULT"]
source = f"{ini['git_url']}/blob/{ini['branch']}"


def readme() -> str:
    """README.md with links that also lead somewhere from a package index."""
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({source}/", text)


def cut_course(root: str) -> None:
    """`minigpt ask` without documents answers from the lessons: their texts are cut anew for what is being built. (Without
    notebooks, as in an sdist, those that lie in the package stay.)"""
    if Path("nbs").is_dir() and Path("tools/notebooks.py").is_file():
        sys.path.insert(0, "tools")
        from notebooks import write_course
        write_course(Path(root) / "minigpt" / "assets" / "course")


class BuildPackage(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            cut_course(self.build_lib)


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        cut_course(base_dir)


setup(
    cmdclass={"build_py": BuildPackage, "sdist": SourceDistribution},
    name=ini["lib_name"],
    version=ini["version"],
    description=ini["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=ini["author"],
    author_email=ini["author_email"],
    keywords=ini["keywords"],
    license_expression=ini["license"],
    license_files=["LICENSE", "minigpt/assets/gpt2/LICENSE", "minigpt/assets/web/licenses.md"],
    url=ini["git_url"],
    project_urls={"Documentation": ini["doc_url"], "Source": ini["git_url"], "Issues": f"{ini['git_url']}/issues",
                  "Changelog": f"{source}/CHANGELOG.md"},
    packages=find_packages(include=["minigpt", "minigpt.*"]),
    include_package_data=True,
    python_requires=f">={ini['min_python']}",
    install_requires=ini["requirements"].split(),
    extras_require={"dev": ini["dev_requirements"].split()},
    entry_points={"console_scripts": ini["console_scripts"].split("\n")},
    classifiers=[
        f"Development Status :: {ini['status']}",
        f"Intended Audience :: {ini['audience']}",
        f"Natural Language :: {ini['language']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in ini["python_versions"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
