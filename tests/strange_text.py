"""Names and sentences as users have them, to be shown on every figure and page."""

STRANGE_NAMES = (
    "$x^2$ and $y$",
    r"$\nothing{$",
    "price in $",
    "snake_case_name",
    "{braces} {} %s",
    r"back\slash \alpha",
    "猫と犬",
    "🦖 and 🐱\u200d👤",
    "हाथी",
    "bell \a and escape \x1b[31m",
    "two\nlines\tand a tab",
    "broken caf\udce9",
    "\u202eturned around",
    "<b>&amp;</b>",
    "_hidden",
    "cafe\u0301",
    "",
    "long " * 60,
    "猫" * 90,
)
