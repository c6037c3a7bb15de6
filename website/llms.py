"""llms.txt: the list of pages for machines that read, after llmstxt.org: a title, a summary, and a line a page."""

from __future__ import annotations

from website.pages import Page, in_order

SUMMARY = (
    "The open training pipeline for UniDiffuser: from image-text metadata, or a folder of own images, to a trained any-to-any "
    "image-text model. Prefect flows, Ray jobs, DeepSpeed training, immutable datasets, one command: `unidiffuser`."
)


def listing(pages: list[Page], repository: bool = False) -> str:
    """The file.

    Args:
        repository: link to the files of the repository, for the one in its root; else to the site's Markdown.
    """
    parts = ["# UniDiffuser, trained", "", f"> {SUMMARY}", ""]
    if repository:
        parts += ["What to run and what to keep to while changing the code is in [AGENTS.md](AGENTS.md).", ""]
    for section, those in in_order(pages).items():
        parts += [f"## {section}", ""]
        for page in those:
            lead = f": {page.lead}" if page.lead else ""
            parts.append(f"- [{page.title.replace('`', '')}]({page.source if repository else page.path}){lead}")
        parts.append("")
    return "\n".join(parts)
