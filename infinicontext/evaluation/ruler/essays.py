"""Paul Graham's essays as one text, as RULER's own script makes it: some as text from a repository, the others from his pages."""

import json
from collections.abc import Callable, Iterable

from infinicontext.errors import UserError


def joined(addresses: Iterable[str], fetch: Callable[[str], bytes]) -> bytes:
    """The contents of PaulGrahamEssays.json: the essays by name, those that are texts first.

    Args:
      addresses: of essays; one with .html in it is a page, any other a text.
      fetch: reads one.

    Raises:
      UserError: html2text or Beautiful Soup are missing.
      OSError, UnicodeError: an essay cannot be fetched or read.
    """
    try:
        import html2text
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise UserError('pages are read by html2text and beautifulsoup4: pip install "infinicontext[evaluation]"') from error
    # One reader for all pages, in the order of the addresses, because it remembers things from one to the next.
    reader = html2text.HTML2Text()
    reader.ignore_images = reader.ignore_tables = reader.escape_all = True
    reader.reference_links = reader.mark_code = False
    texts, pages = {}, {}
    for address in addresses:
        name, data = address.rsplit("/", 1)[-1], fetch(address)
        if ".html" in address:
            # The codec, which is not the pages' own, decides what the official text looks like.
            element = BeautifulSoup(data.decode("unicode_escape"), "html.parser").find("font")
            pages[name.replace(".html", ".txt")] = reader.handle(str(element))
        else:
            texts[name] = data.decode("utf-8")
    essays = [found[name] for found in (texts, pages) for name in sorted(found)]
    return json.dumps({"text": "".join(essays).replace("\r\n", "\n").replace("\r", "\n")}).encode()
