"""How pictures look: what they show, in which direction, with which colours and letters."""

from collections.abc import Collection
from dataclasses import dataclass

Look = dict[str, str]
DIRECTIONS = ("LR", "TB", "RL", "BT")


@dataclass(frozen=True)
class Theme:
    """The colours of a picture: fills and lines."""

    page: str
    text: str
    faint: str
    wire: str
    tensor: tuple[str, str]
    pattern: tuple[str, str]
    port: tuple[str, str]
    mark: str


THEMES = {
    "light": Theme(
        "white",
        "#222222",
        "#888888",
        "#888888",
        ("#dce8f5", "#5f86b3"),
        ("#fdeacb", "#cf9a45"),
        ("#f2f2f2", "#bbbbbb"),
        "#c8321e",
    ),
    "dark": Theme(
        "#1b1d21",
        "#eeeeee",
        "#9a9a9a",
        "#9a9a9a",
        ("#2b4561", "#84aede"),
        ("#5b4520", "#e0b060"),
        ("#33363c", "#70757d"),
        "#ff7a62",
    ),
}


@dataclass(frozen=True)
class Style:
    """The options of a picture.

    Args:
        direction: From inputs to results: ``"LR"`` left to right, ``"TB"``, ``"RL"`` or ``"BT"``.
        sizes: Whether legs carry their sizes.
        labels: Whether legs carry their names.
        ones: Whether legs of size one are shown.
        highlight: Names of operands and legs that are marked; a pattern is marked by any leg.
        theme: ``"light"`` or ``"dark"``.
        dpi: Dots per inch of a .png.
        font: The font of all letters.

    Raises:
        ValueError: an unknown direction or theme, or a dpi that is not positive.
    """

    direction: str = "LR"
    sizes: bool = True
    labels: bool = True
    ones: bool = False
    highlight: Collection[str] = ()
    theme: str = "light"
    dpi: int = 300
    font: str = "Helvetica,Arial,sans-serif"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}; expected one of {DIRECTIONS}")
        if self.theme not in THEMES:
            raise ValueError(f"theme is {self.theme!r}; expected one of {tuple(THEMES)}")
        if self.dpi < 1:
            raise ValueError(f"dpi is {self.dpi}; expected at least 1")
        if isinstance(self.highlight, str):
            raise ValueError(f"highlight is {self.highlight!r}; expected a list of names")

    @property
    def colours(self) -> Theme:
        return THEMES[self.theme]

    @property
    def graph(self) -> Look:
        return self._text | {
            "rankdir": self.direction,
            "bgcolor": self.colours.page,
            "nodesep": "0.2",
            "ranksep": "0.35",
        }

    @property
    def node(self) -> Look:
        return self._text | {"style": "filled", "penwidth": "0.8", "width": "0", "height": "0"}

    @property
    def edge(self) -> Look:
        return self._text | {"color": self.colours.wire, "penwidth": "0.8"}

    @property
    def _text(self) -> Look:
        return {"fontname": self.font, "fontcolor": self.colours.text, "fontsize": "10"}

    @property
    def tensor(self) -> Look:
        fill, line = self.colours.tensor
        size = {"width": "0.6", "height": "0.45", "fontsize": "12"}
        return {"style": "filled,rounded", "shape": "box", "fillcolor": fill, "color": line} | size

    @property
    def pattern(self) -> Look:
        fill, line = self.colours.pattern
        size = {"margin": "0.02", "height": "0.38", "width": "0.38"}
        return {"shape": "ellipse", "fillcolor": fill, "color": line} | size

    @property
    def port(self) -> Look:
        fill, line = self.colours.port
        return {"shape": "box", "fillcolor": fill, "color": line, "margin": "0.05,0.03"}

    @property
    def loose(self) -> Look:
        return {"shape": "plaintext", "fillcolor": self.colours.page, "margin": "0.03"}

    @property
    def sign(self) -> Look:
        return {"shape": "plaintext", "fillcolor": self.colours.page, "fontsize": "16"}

    @property
    def dot(self) -> Look:
        return {
            "shape": "point",
            "width": "0.06",
            "height": "0.06",
            "fillcolor": self.colours.text,
            "color": self.colours.text,
        }

    @property
    def step(self) -> Look:
        return {"style": "rounded", "color": self.colours.port[1], "margin": "12"}

    @property
    def marked(self) -> Look:
        """What a highlighted node or wire has, too."""
        return {"color": self.colours.mark, "penwidth": "2"}
