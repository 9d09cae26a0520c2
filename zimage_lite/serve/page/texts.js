/** What the page says. English stands where it is said, here its Chinese. */

const CHINESE = {
  "Settings": "设置",
  "Prompt": "提示词",
  "Negative prompt": "反向提示词",
  "Draw": "绘制",
  "Pictures": "张数",
  "Size": "尺寸",
  "Preset": "预设",
  "Width": "宽",
  "Height": "高",
  "Swap width and height": "交换宽和高",
  "Steps": "步数",
  "Seed": "种子",
  "Random": "随机",
  "Keep it": "保持不变",
  "Add a LoRA": "添加 LoRA",
  "From a picture": "以图生图",
  "Choose, drop or paste a picture": "选择、拖入或粘贴一张图片",
  "The picture to start from": "起始图片",
  "The mask: white is drawn anew": "蒙版：白色部分将重新绘制",
  "Use its settings": "使用图片中的设置",
  "Paint a mask": "绘制蒙版",
  "Without the mask": "去掉蒙版",
  "Without the picture": "去掉图片",
  "Strength: 1 draws all anew": "强度：1 表示完全重新绘制",
  "Model": "模型",
  "Strength": "强度",
  "Made of the picture first": "对图片的预处理",
  "Picture to follow": "控制图片",
  "More": "更多",
  "Guidance": "引导强度",
  "Sampler": "采样器",
  "Schedule": "调度",
  "Picture": "图片",
  "Nothing is drawn yet.": "还没有图片。",
  "Progress": "进度",
  "Cancel": "取消",
  "Queue": "队列",
  "Gallery": "图库",
  "Older ones": "更早的图片",
  "Paint what is drawn anew": "涂抹需要重新绘制的部分",
  "Mask: arrow keys move the brush, space paints": "蒙版：方向键移动画笔，空格键涂抹",
  "Brush": "画笔",
  "Undo": "撤销",
  "Invert": "反选",
  "Done": "完成",
  "Reading the prompt": "正在读取提示词",
  "Drawing": "正在绘制",
  "Finishing": "正在生成图片",
  "Opening the model": "正在打开模型",
  "step {step} of {steps}": "第 {step} 步，共 {steps} 步",
  "{m} min {s} s left": "剩余 {m} 分 {s} 秒",
  "{s} s left": "剩余 {s} 秒",
  "Waiting.": "等待中。",
  "Drawing.": "正在绘制。",
  "The picture is drawn.": "图片已完成。",
  "Cancelled.": "已取消。",
  "Lost: the server stopped.": "已丢失：服务器停止了。",
  "It could not be drawn.": "无法绘制。",
  "seed {seed}": "种子 {seed}",
  "{steps} steps": "{steps} 步",
  "guidance {guidance}": "引导 {guidance}",
  "Use settings": "使用设置",
  "Draw again": "再次绘制",
  "Delete": "删除",
  "Delete this with its pictures?": "删除这项任务及其图片？",
  "Not taken over: {names}": "未采用：{names}",
  "Remove": "移除",
  "The model's or the picture's": "模型或图片的尺寸",
  "Other": "其他",
  "None": "无",
  "The server is away.": "服务器没有响应。",
  "GPU memory": "显存",
  "Memory": "内存",
  "It does not fit.": "内存不足。",
  "About {s} s, by prediction.": "预计约 {s} 秒。",
  "About {m} min {s} s, by prediction.": "预计约 {m} 分 {s} 秒。",
  "Drawn at the same time": "同时绘制",
  "{place}: {planned} GB planned of {most}": "{place}：计划 {planned} GB，上限 {most} GB",
  "{place}: {used} GB used, {planned} planned, of {most}": "{place}：已用 {used} GB，计划 {planned} GB，上限 {most} GB",
};
const SPOKEN = ["aria-label", "alt"]; // attributes that are read out
const english = new WeakMap(); // text nodes and attributes -> as the page came

export const language = () =>
  localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh-CN" : "en");

export function setLanguage(name) {
  if (name !== language()) localStorage.setItem("language", name);
  document.documentElement.lang = name;
}

/** values: for what stands in braces. */
export function say(text, values = {}) {
  const said = document.documentElement.lang === "zh-CN" ? CHINESE[text] ?? text : text;
  return said.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** What stood in the page when it came. */
export function translate(root) {
  if (!english.has(root)) english.set(root, [...saidIn(root)].filter(([, text]) => text in CHINESE));
  for (const [node, text] of english.get(root)) node.nodeValue = say(text);
}

function* saidIn(root) {
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) yield [texts.currentNode, texts.currentNode.nodeValue.trim()];
  for (const name of SPOKEN)
    for (const one of root.querySelectorAll(`[${name}]`)) {
      const attribute = one.getAttributeNode(name);
      yield [attribute, attribute.value.replace(/\s+/g, " ")];
    }
}
