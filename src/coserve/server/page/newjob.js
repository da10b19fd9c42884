// The form that starts a job: uploads files as they are chosen and shows what they hold, creates the job, puts the server's
// complaints beside the fields they name.

import { post, remove, upload } from "./api.js";
import { DataPreview } from "./datapreview.js";
import { byId, bytes, modelOption, setNotice, setText } from "./dom.js";

const FILES = ["training_file", "validation_file"];
const FIELDS = ["training_file", "validation_file", "model", "suffix", "n_epochs", "rank", "learning_rate"];

export class JobForm {
  constructor({ onCreated }) {
    this.onCreated = onCreated;
    this.uploaded = new WeakMap();
    this.chosen = {};
    this.preview = new DataPreview();
    this.looking = null;
    this.names = null;
    byId("new-job").onclick = () => this.open(byId("job-form").hidden);
    byId("job-form").onsubmit = (event) => {
      event.preventDefault();
      this.submit();
    };
    for (const name of FIELDS) byId(`job-${name}`).oninput = () => showError(name, "");
    for (const name of FILES) byId(`job-${name}`).onchange = () => this.look();
    const card = byId("jobs");
    card.ondragover = (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      card.classList.add("dragging");
    };
    card.ondragleave = (event) => {
      if (!card.contains(event.relatedTarget)) card.classList.remove("dragging");
    };
    card.ondrop = (event) => this.drop(event);
  }

  open(wanted) {
    byId("job-form").hidden = !wanted;
    byId("new-job").setAttribute("aria-expanded", String(wanted));
    setText(byId("new-job"), wanted ? "Close" : "New job");
    if (wanted) byId("job-training_file").focus();
  }

  drop(event) {
    byId("jobs").classList.remove("dragging");
    if (event.dataTransfer.files.length === 0) return;
    event.preventDefault();
    this.open(true);
    const onto = event.target.id === "job-validation_file" ? "validation_file" : "training_file";
    byId(`job-${onto}`).files = event.dataTransfer.files;
    showError(onto, "");
    this.look();
  }

  /** Uploads the chosen files and shows what a job would train on. Files that were chosen before are deleted again. */
  async look() {
    this.looking?.abort();
    const looking = (this.looking = new AbortController());
    const body = { model: byId("job-model").value };
    let field = null;
    try {
      for (field of FILES) {
        const file = byId(`job-${field}`).files[0];
        if (this.chosen[field] !== file) this.discard(this.chosen[field]);
        this.chosen[field] = file;
        if (!file) continue;
        this.preview.wait(`Uploading ${file.name}, ${bytes(file.size)}`);
        body[field] = await this.send(file);
        if (looking.signal.aborted) return;
      }
      field = null;
      if (!body.training_file) return this.preview.clear();
      this.preview.wait("Reading the data");
      const found = await post("v1/fine_tuning/jobs/check", body, looking.signal);
      if (!looking.signal.aborted) this.preview.show(found);
    } catch (error) {
      if (looking.signal.aborted) return;
      if (field && error.status !== 0) {
        showError(field, error.message);
        this.preview.clear();
      } else {
        this.preview.fail(error.message);
      }
    }
  }

  /** Deletes an uploaded file that no job uses. */
  discard(file) {
    if (!file) return;
    this.uploaded.get(file)?.then((id) => remove(`v1/files/${id}`)).catch(() => {});
    this.uploaded.delete(file);
  }

  /** models: of /v1/models; a tuned one is trained further. */
  setModels(models) {
    const names = models.map((model) => model.id);
    if (names.join("\n") === this.names) return;
    this.names = names.join("\n");
    const select = byId("job-model");
    const before = select.value;
    select.replaceChildren(...names.map(modelOption));
    select.value = names.includes(before) ? before : (models.find((model) => !model.parent)?.id ?? "");
  }

  async submit() {
    for (const name of FIELDS) showError(name, "");
    setNotice(byId("job-form-error"), "");
    const settings = readSettings();
    if (settings === null) return;
    byId("job-submit").disabled = true;
    let field = "training_file";
    try {
      const body = { model: byId("job-model").value, ...settings };
      for (field of FILES) {
        const file = byId(`job-${field}`).files[0];
        if (!file) continue;
        setText(byId("job-form-status"), `Uploading ${file.name}, ${bytes(file.size)}`);
        body[field] = await this.send(file);
      }
      setText(byId("job-form-status"), "Creating the job");
      field = null;
      const job = await post("v1/fine_tuning/jobs", body);
      this.looking?.abort();
      this.chosen = {};
      this.preview.clear();
      byId("job-form").reset();
      this.open(false);
      byId("jobs").focus({ preventScroll: true });
      this.onCreated(job);
    } catch (error) {
      this.showProblem(error, field);
    }
    setText(byId("job-form-status"), "");
    byId("job-submit").disabled = false;
  }

  /** Uploads a file once, however often the form is sent. */
  send(file) {
    if (!this.uploaded.has(file)) {
      const sent = upload(file).then(({ id }) => id);
      this.uploaded.set(file, sent);
      sent.catch(() => this.uploaded.delete(file));
    }
    return this.uploaded.get(file);
  }

  showProblem(error, uploading) {
    const named = (error.param ?? "").split(".").reverse().find((part) => FIELDS.includes(part));
    const field = uploading ?? named;
    if (!field || error.status === 0) {
      setNotice(byId("job-form-error"), error.message);
      return;
    }
    showError(field, error.message);
    byId(`job-${field}`).focus();
  }
}

function showError(name, message) {
  setText(byId(`error-${name}`), message);
  if (message) byId(`job-${name}`).setAttribute("aria-invalid", "true");
  else byId(`job-${name}`).removeAttribute("aria-invalid");
}

/** The body's fields beside model and files; null if something is missing or no number, which is then shown. */
function readSettings() {
  const text = (name) => byId(`job-${name}`).value.trim();
  const problems = [];
  if (byId("job-training_file").files.length === 0) problems.push(["training_file", "Choose a file to train on."]);
  const read = (name) => {
    if (!text(name) || text(name) === "auto") return undefined;
    const value = Number(text(name));
    if (!(value > 0)) problems.push([name, "Must be a number above 0."]);
    return value;
  };
  const epochs = read("n_epochs");
  const settings = { suffix: text("suffix") || undefined, rank: read("rank"), learning_rate: read("learning_rate") };
  if (epochs !== undefined) settings.method = { type: "supervised", supervised: { hyperparameters: { n_epochs: epochs } } };
  for (const [name, message] of problems) showError(name, message);
  if (problems.length > 0) {
    byId(`job-${problems[0][0]}`).focus();
    return null;
  }
  return settings;
}
