// Puts the page's parts together and keeps the list of models fresh.

import { get } from "./api.js";
import { ChatView } from "./chat.js";
import { byId, setText } from "./dom.js";
import { JobDetail } from "./jobdetail.js";
import { JobsView } from "./jobs.js";
import { LiveView } from "./live.js";
import { JobForm } from "./newjob.js";

const MODELS_MS = 5000;

const chat = new ChatView();
const detail = new JobDetail({ onAsk: (model) => chat.choose(model) });
const jobs = new JobsView(detail);
const form = new JobForm({ onCreated: (job) => jobs.add(job) });

async function refreshModels() {
  if (!document.hidden) {
    try {
      const { data } = await get("v1/models");
      chat.setModels(data);
      form.setModels(data);
    } catch {
      // The header says that the server is away; the lists stay as they are.
    }
  }
  setTimeout(refreshModels, MODELS_MS);
}

// A phone shows the charts on request; where there is room they are always there.
const roomy = window.matchMedia("(min-width: 720px)");
const unfold = () => (byId("more-figures").open = roomy.matches);
roomy.addEventListener("change", unfold);
unfold();

setText(byId("api-base"), new URL("v1", document.baseURI).href);
new LiveView().run();
jobs.run();
refreshModels();
