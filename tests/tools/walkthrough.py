"""The way through the MLflow UI of notebooks/walkthrough.md, walked in a real browser.

``python -m tests.tools.walkthrough`` runs the series on the bundled sample, shows the UI through
the stand-in for ngrok, walks through it, and makes the screenshots in ``notebooks/images/`` anew.
The tests walk the same way (`Walk`).
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from helpers import server
from helpers.server import credentials, tunnel
from helpers.workspace import PROJECT_ROOT, open_workspace
from tests.doubles.ngrok import NgrokCloud
from tests.series import run_series

IMAGES = PROJECT_ROOT / "notebooks" / "images"
BY_HAND = "model_registered_by_hand"
NGROK_PAGE = "01_ngrok"
SIZE = {"width": 1280, "height": 800}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def environment(**changes):
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def exposed(workspace, cloud, folder):
    """Show a workspace's UI through the stand-in for ngrok; gives its `tunnel.Address`."""
    with environment(**cloud.machine(folder)):
        try:
            yield tunnel.show_ui(workspace, True)
        finally:
            tunnel.close_tunnel(workspace)
            server.stop_server(workspace)


@contextmanager
def everyday_page(profile):
    """Give a page of a browser with a profile that allows cookies of other sites, as Colab needs.

    Frames of other sites may then keep something, too, without which MLflow's UI stays blank.
    """
    preferences = {"profile": {"block_third_party_cookies": False, "cookie_controls_mode": 0}}
    (profile / "Default").mkdir(parents=True)
    (profile / "Default" / "Preferences").write_text(json.dumps(preferences), encoding="utf-8")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_browser(),
            args=["--no-sandbox", "--disable-gpu"],
            viewport=SIZE,
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield page
        context.close()


@contextmanager
def browser_page(cloud, user, password):
    """Give a page of a fresh browser that reaches the tunnel and signs in as a user."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(),
            proxy={"server": cloud.proxy_url},
            args=["--no-sandbox", "--disable-gpu", "--disable-quic"],
        )
        context = browser.new_context(
            viewport=SIZE,
            ignore_https_errors=True,
            http_credentials={"username": user, "password": password} if user else None,
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


class Walk:
    """The steps, each of which leaves a screenshot.

    Parameters
    ----------
    page : playwright.sync_api.Page
    url : str
        Public address of the UI.
    folder : pathlib.Path
        For the screenshots.

    Attributes
    ----------
    refused : list of (int, str, str)
        Status, method and URL of every request that the page made in vain.
    """

    def __init__(self, page, url, folder):
        self.page, self.url, self.folder = page, url, Path(folder)
        self.refused = []
        page.on("response", self._note)

    def _note(self, response):
        if response.status >= 400:
            self.refused.append((response.status, response.request.method, response.url))

    def _shoot(self, name):
        # What fades in would be half there.
        self.page.wait_for_timeout(700)
        picture = Image.open(io.BytesIO(self.page.screenshot(animations="disabled")))
        small = picture.convert("RGB").quantize(192, dither=Image.Dither.NONE)
        small.save(self.folder / f"{name}.png", optimize=True)

    def _link(self, name):
        return self.page.get_by_role("link", name=name, exact=True).first

    def _dismiss(self):
        """Close what MLflow puts in front of a newcomer: its assistant and its announcements."""
        dialog = self.page.get_by_role("dialog")
        if dialog.count():
            dialog.first.get_by_role("button", name="Close").first.click()
            dialog.first.wait_for(state="hidden")

    def open(self):
        """Pass ngrok's page, sign in, and choose the part of the UI that shows models."""
        self.page.goto(self.url)
        self.page.get_by_role("button", name="Visit Site").wait_for()
        self._shoot(NGROK_PAGE)
        self.page.get_by_role("button", name="Visit Site").click()
        self.page.get_by_role("button", name="Model training").click()
        close = self.page.locator("aside, [role=complementary]").get_by_role("button", name="Close")
        if close.count():
            close.first.click()
        self._shoot("02_home")

    def experiment(self, name, picture=None):
        """Experiments → the experiment."""
        if self._link("Experiments").is_visible():
            self._link("Experiments").click()
        else:
            self.page.get_by_role("link").first.click()  # MLflow's logo leads home
            self._link("View all").click()
        self._link(name).wait_for()
        if picture:
            self._shoot(picture)
        self._link(name).click()

    def run(self, name, picture=None):
        """The experiment's runs → the run."""
        self._link(name).wait_for()
        if picture:
            self._shoot(picture)
        self._link(name).click()
        self.page.get_by_text("Metrics (").first.wait_for()

    def metrics(self, picture, heading="Metrics ("):
        """Return the run's metrics and parameters as the page shows them."""
        self.page.get_by_text(heading).first.evaluate("heading => heading.scrollIntoView()")
        self._shoot(picture)
        rows = self.page.get_by_role("row").all()
        cells = [row.inner_text().split("\n") for row in rows]
        return {row[0].strip(): row[1].strip() for row in cells if len(row) > 1}

    def confusion_matrix(self, picture):
        """Artifacts → confusion_matrix → the picture; return its width in pixels."""
        self.page.get_by_role("tab", name="Artifacts").click()
        self.page.get_by_text("confusion_matrix", exact=True).first.click()
        self.page.get_by_text("confusion_matrix.png", exact=True).first.click()
        image = self.page.locator(
            "img[src^='blob:'], img[src^='data:'], .image-container img"
        ).first
        image.wait_for()
        self._shoot(picture)
        return image.evaluate("image => image.naturalWidth")

    def model_files(self, picture):
        """Overview → Logged models → the model → Artifacts; return the text of the page."""
        self.page.get_by_role("tab", name="Overview").click()
        self.page.get_by_text("Logged models (").first.wait_for()
        self.page.get_by_role("link", name="model", exact=True).last.click()
        self.page.get_by_role("button", name="Register model").wait_for()
        self._link("Artifacts").click()
        self.page.get_by_text("MLmodel").first.wait_for()
        self._shoot(picture)
        return self.page.inner_text("body")

    def register(self, name, picture, done):
        """Register model → Create New Model → name → Register."""
        self.page.get_by_role("button", name="Register model").click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("combobox").first.click()
        self.page.get_by_text("Create New Model").last.click()
        dialog.get_by_placeholder("Input a model name").fill(name)
        self._shoot(picture)
        dialog.get_by_role("button", name="Register", exact=True).click()
        dialog.wait_for(state="hidden")
        self._link("Overview").click()
        self.page.get_by_text("Model versions").wait_for()
        self._shoot(done)

    def models(self, picture):
        """Model registry, with the new registry UI switched off; return the table's rows."""
        self._link("Model registry").click()
        self.page.get_by_role("button", name="Create Model").wait_for()
        self.page.wait_for_timeout(1000)
        self._dismiss()
        switch = self.page.get_by_role("switch").first
        if switch.get_attribute("aria-checked") == "true":
            switch.click()
            self.page.get_by_role("button", name="Disable").click()
        self.page.get_by_role("columnheader", name="Production").wait_for()
        self.page.wait_for_timeout(500)
        self._shoot(picture)
        return [row.inner_text().split("\n") for row in self.page.get_by_role("row").all()]

    def promote(self, name, picture, done):
        """Models → Version 1 → Stage → Production."""
        row = self.page.get_by_role("row").filter(has_text=name).first
        row.get_by_role("link", name="Version 1").first.click()
        self.page.get_by_text("None", exact=True).first.click()
        choice = self.page.get_by_role("menuitem").filter(has_text="Production").first
        choice.wait_for()
        self._shoot(picture)
        choice.click()
        dialog = self.page.get_by_role("dialog").last
        dialog.get_by_role("button", name="OK").click()
        dialog.wait_for(state="hidden")
        self.page.get_by_text("Production", exact=True).first.wait_for()
        self._shoot(done)

    def card(self, name):
        """The page of version 1 → its description; return the headings of the tables in it."""
        self.page.goto(f"{self.url}/#/models/{name}/versions/1")
        self.page.get_by_text("Brier score").first.wait_for()
        return self.page.locator("table").first.locator("th").all_inner_texts()


def walk(page, url, folder):
    """Walk the whole way; return what was seen on it.

    Parameters
    ----------
    page : playwright.sync_api.Page
    url : str
    folder : pathlib.Path

    Returns
    -------
    dict
        ``metrics`` and ``files`` of the network's run, ``svm`` (parameters and metrics),
        ``matrices`` (widths of the pictures), ``models`` (rows of the Models page, at the end),
        ``card`` (headings of the first table of a model card) and ``refused`` requests.
    """
    way, seen = Walk(page, url, folder), {}
    way.open()
    way.experiment("conv_network", "03_experiments")
    way.run("default_logistic", "04_runs")
    seen["metrics"] = way.metrics("05_metrics")
    seen["matrices"] = [way.confusion_matrix("06_confusion_matrix")]
    seen["files"] = way.model_files("07_model_files")
    way.register(BY_HAND, "08_register_model", "09_registered")
    way.models("10_models")
    way.promote(BY_HAND, "11_stage", "12_in_production")
    seen["models"] = way.models("13_models_in_production")
    way.experiment("svc_model")
    way.run("svm")
    seen["svm"] = way.metrics("14_svm", "Parameters (")
    seen["matrices"].append(way.confusion_matrix("15_svm_confusion_matrix"))
    seen["card"] = way.card("model_svm_rbf")
    return {**seen, "refused": way.refused}


def main(arguments=None):
    """Make the screenshots of the README anew."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.walkthrough", description=main.__doc__
    )
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    if find_browser() is None:
        print(f"No browser: install one of {', '.join(BROWSERS)}.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        workspace = open_workspace(Path(temporary) / "workspace")
        done = run_series(workspace.root, "--data", "sample", "-p", "EXPOSE_UI", "False")
        print(done.stdout, done.stderr, sep="\n")
        if done.returncode:
            return 1
        with NgrokCloud() as cloud, exposed(workspace, cloud, Path(temporary)) as address:
            password = credentials.password_of(workspace, "editor")
            with browser_page(cloud, "editor", password) as page:
                walk(page, address.url, options.images)
    # The stand-in's page is not what ngrok shows.
    (options.images / f"{NGROK_PAGE}.png").unlink()
    print(f"The pictures in {options.images} are new.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
