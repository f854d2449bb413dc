"""Packaging: everything that can be set lies in settings.ini."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
ini = config["DEFAULT"]
source = f"{ini['git_url']}/blob/{ini['branch']}"


def readme() -> str:
    """README.md with links that also lead somewhere from a package index."""
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({source}/", text)


class BuildWithCourse(build_py):
    """`minigpt ask` without documents answers from the lessons: their texts are cut anew for each wheel. (An sdist has no
    notebooks: there the texts that lie in the package stay.)"""

    def run(self):
        super().run()
        if not self.editable_mode and Path("nbs").is_dir() and Path("tools/notebooks.py").is_file():
            sys.path.insert(0, "tools")
            from notebooks import write_course
            write_course(Path(self.build_lib) / "minigpt" / "assets" / "course")


setup(
    cmdclass={"build_py": BuildWithCourse},
    name=ini["lib_name"],
    version=ini["version"],
    description=ini["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=ini["author"],
    author_email=ini["author_email"],
    keywords=ini["keywords"],
    license_expression=ini["license"],
    license_files=["LICENSE", "minigpt/assets/gpt2/LICENSE"],
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
