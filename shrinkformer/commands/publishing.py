"""What happens to a checkpoint once it is measured: its card gets figures, trackers and the hub get what was asked."""

from collections.abc import Callable, Collection
from pathlib import Path

from shrinkformer.commands.cards import Card, finish_card
from shrinkformer.commands.report import Run
from shrinkformer.commands.tracking import track
from shrinkformer.errors import HubError, ShrinkformerError
from shrinkformer.pictures.columns import exact
from shrinkformer.utils.upload import push_to_hub


class Publisher:
    """Publishes the checkpoints of one command. What fails is told at the end, when nothing can be lost any more."""

    def __init__(
        self, repo_id: str, *, private: bool, several: bool, report_to: Collection[str], say: Callable[[str], None]
    ) -> None:
        """Prepare.

        Args:
            repo_id: Where to on the hub; "" for nowhere.
            private: Whether a new repository is private.
            several: Whether there are several budgets; their repositories are named ``<repo_id>-mu<mu>``.
            report_to: Names of trackers.
            say: Tells the user.
        """
        self.repo_id, self.private, self.several, self.report_to, self.say = repo_id, private, several, report_to, say
        self._folders: dict[str, Path] = {}
        self._failures: list[str] = []

    def take(self, run: Run, cards: Collection[Card], tracked: Path) -> None:
        """A finished run and the cards of what it saved; of several formats, later ones go to ``<repo_id>-<format>``.

        Args:
            run: With all figures.
            cards: Their folders are complete but for the figures in the cards.
            tracked: Folder for trackers.
        """
        for number, card in enumerate(cards):
            finish_card(card, run)
            name = self.repo_id + (f"-mu{exact(run.mu)}" if self.several else "") + (f"-{card.kind}" if number else "")
            self._folders[name] = card.folder
        try:
            track(run, self.report_to, tracked)
        except ShrinkformerError as error:
            self._failures.append(str(error))

    def close(self) -> None:
        """Send everything to the hub, if that was asked for.

        Raises:
            HubError: Something was not sent, or a tracker failed before.
        """
        for repo_id, folder in self._folders.items() if self.repo_id else ():
            try:
                self.say(f"pushed {folder} to {push_to_hub(folder, repo_id, private=self.private)}")
            except ShrinkformerError as error:
                self._failures.append(f"{error} It is saved; shrinkformer push {folder} {repo_id} tries again.")
        if self._failures:
            raise HubError(" ".join(self._failures))
