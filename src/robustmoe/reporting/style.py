"""The page's style sheet: light, dark, narrow and printed. No font, image or rule is loaded from anywhere."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--paper:#f7f6f2;--card:#fff;--ink:#191c22;--soft:#5a606c;--rule:#e2dfd7;--tint:#f0eee8;
--good:#16714a;--good-bg:#e0f2e8;--warn:#8a5a00;--warn-bg:#fbeecb;--bad:#b3261e;--bad-bg:#fce4e1;--mute-bg:#ebe9e3;
--heat:37 92 196;--onheat:#fff;
--c1:#255cc4;--c2:#c4570f;--c3:#0e7a6d;--c4:#7d3fc0;--c5:#b9306f;--c6:#66740a;--c7:#0f7fa8;--c8:#7a5a3c}
@media (prefers-color-scheme:dark){:root{--paper:#121419;--card:#1a1d24;--ink:#eceef2;--soft:#a0a7b5;--rule:#2e323c;
--tint:#22262f;--good:#6fd6a3;--good-bg:#15362a;--warn:#f0c063;--warn-bg:#3b2f12;--bad:#ff9a90;--bad-bg:#47201d;
--mute-bg:#2a2e38;--heat:122 168 255;--onheat:#10131a;
--c1:#7aa8ff;--c2:#ff9f5f;--c3:#55cdbb;--c4:#bd94ff;--c5:#ff8ab8;--c6:#c2d052;--c7:#62c9ee;--c8:#d2ad86}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;-webkit-text-size-adjust:100%}
main,header.top,footer{max-width:1080px;margin:0 auto;padding:0 28px}
header.top{padding-top:44px}
.eyebrow{margin:0;color:var(--soft);font-size:13px;letter-spacing:.09em;text-transform:uppercase;font-weight:600}
h1{font-size:34px;line-height:1.18;letter-spacing:-.02em;margin:6px 0 4px;font-weight:700;overflow-wrap:anywhere}
h2{font-size:22px;letter-spacing:-.012em;margin:0 0 4px;line-height:1.25}
h3{font-size:16px;margin:24px 0 8px}
section{margin:52px 0 0}
section>p.lead,.lead{color:var(--soft);max-width:68ch;margin:0 0 18px}
code,.mono,pre{font-family:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"Liberation Mono",monospace;
font-size:.88em;overflow-wrap:anywhere}
nav{margin:18px 0 0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px}
nav a{color:var(--soft);text-decoration:none;border-bottom:1px solid var(--rule)}
nav a:hover,nav a:focus{color:var(--ink);border-color:currentColor}
.cards{display:grid;gap:20px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));margin-top:28px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:26px 28px;min-width:0}
.card.marked{border-color:var(--bad)}
.card>h2{display:flex;gap:10px;align-items:baseline;overflow-wrap:anywhere}
.dotkey{width:12px;height:12px;border-radius:50%;flex:none;display:inline-block}
.story{font-size:17px;line-height:1.55;margin:8px 0 22px;max-width:72ch}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:18px 24px;margin:0}
.figures>div{min-width:0}
.figures dt{color:var(--soft);font-size:13px;margin:0}
.figures dd{margin:2px 0 0;font-size:19px;font-weight:600;line-height:1.25;overflow-wrap:anywhere}
.figures dd.big{font-size:44px;font-weight:700;letter-spacing:-.035em;line-height:1.1;
white-space:nowrap;font-variant-numeric:tabular-nums}
.figures dd.big.marked{color:var(--bad)}
.figures small{display:block;white-space:normal;color:var(--soft);font-size:13px;font-weight:400;letter-spacing:0;
margin-top:3px;line-height:1.4}
.bar{margin:24px 0 0}
.bar .track{position:relative;height:16px;border-radius:8px;background:var(--tint);overflow:visible}
.bar .fill{position:absolute;left:0;top:0;bottom:0;border-radius:8px}
.bar .lost{opacity:.26}
.bar .hatch{background-image:repeating-linear-gradient(-45deg,transparent 0 5px,var(--card) 5px 8px)}
.bar .err{position:absolute;top:-5px;bottom:-5px;border:2px solid var(--ink);border-width:0 2px;min-width:3px;
background:linear-gradient(var(--card),var(--card)) center/100% 2px no-repeat}
.bar .scale{position:relative;height:20px;margin-top:4px;color:var(--soft);font-size:12px}
.bar .scale span{position:absolute;transform:translateX(-50%)}
.bar .scale span:first-child{transform:none}.bar .scale span:last-child{transform:translateX(-100%)}
.chips{display:flex;flex-wrap:wrap;gap:7px;margin:20px 0 0;padding:0;list-style:none}
.chip{display:inline-block;border-radius:99px;padding:2px 11px;font-size:13px;font-weight:600;line-height:1.6;
background:var(--mute-bg);color:var(--soft);white-space:nowrap}
.chip.pass{background:var(--good-bg);color:var(--good)}.chip.warn{background:var(--warn-bg);color:var(--warn)}
.chip.fail{background:var(--bad-bg);color:var(--bad)}
.alarm{margin:20px 0 0;padding:12px 16px;border-radius:10px;background:var(--bad-bg);color:var(--bad);font-size:15px}
.alarm.mild{background:var(--warn-bg);color:var(--warn)}
.alarm b{display:block}.alarm ul{margin:4px 0 0;padding-left:18px}.alarm li{overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:14px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
table.data th,table.data td{padding:11px 13px;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}
table.data thead th{font-size:13px;color:var(--soft);font-weight:600;vertical-align:bottom;line-height:1.35}
table.data th:first-child,table.data td:first-child,table.data .left{text-align:left}
table.data tbody th{font-weight:500;min-width:150px}table.data.attacks tbody th{min-width:250px}
table.data.tight tbody th{min-width:0}table.tight td small{display:inline!important;margin-left:10px}
h2+.scroll{margin-top:14px}
h3.suite{margin-top:30px}h3.suite+.lead{margin-bottom:10px}.gap{max-width:72ch;margin:0 0 14px}
.scroll.fit{max-width:600px;margin-bottom:26px}table.data.parts th,table.data.parts td{padding:6px 16px}
table.data.parts tr.head th{background:var(--tint);color:var(--soft);font-size:13px;font-weight:600}
table.data.parts tr.idle>*,table.data.parts td.soft{color:var(--soft)}
details{margin:14px 0 0}summary{cursor:pointer;font-weight:600;font-size:15px;padding:4px 0;margin-bottom:8px}
table.data tbody tr:last-child>*{border-bottom:0}
table.data tr.worst>*{background:var(--tint);font-weight:700}
table.data td small,table.data th small{display:block;color:var(--soft);font-size:12px;font-weight:400;
white-space:nowrap}
table.data tbody th small{white-space:normal}
td .flag,th .flag{color:var(--bad);font-weight:700}
.terms{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:10px 32px;margin:18px 0 0;
font-size:14px;color:var(--soft)}
.terms div{margin:0}.terms dt{display:inline;color:var(--ink);font-weight:600}.terms dd{display:inline;margin:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:20px}
.plots.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.plots.pair{grid-template-columns:minmax(0,3fr) minmax(0,2fr);align-items:start}
@media (max-width:820px){.plots.pair{grid-template-columns:minmax(0,1fr)}}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:16px 18px 12px;
min-width:0}
figcaption{font-weight:600;font-size:15px;margin-bottom:4px;overflow-wrap:anywhere}
figure svg{display:block;overflow:visible;width:100%;height:auto;margin-top:6px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0;padding:0;font-size:13px;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.key{width:16px;height:4px;border-radius:2px;flex:none}.key.dashed{opacity:.5}
.note{font-size:13px;color:var(--soft);margin:6px 0 2px}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.whisker{stroke:var(--ink);stroke-width:1.5}
.tick,.label{font-size:12px;fill:var(--soft)}
.thin{fill:none;stroke-width:1.2;opacity:.5}.ring{fill:none;stroke:var(--ink);stroke-width:1.6}
.mark{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:3 4}.joint{max-width:780px}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line.dashed{stroke-dasharray:2 5;opacity:.8}
.band{opacity:.15}.layer{opacity:.82;stroke:var(--card);stroke-width:1}
.heats{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:20px}
.heats.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.heatbox{overflow:auto;max-height:560px;background:var(--card);border:1px solid var(--rule);border-radius:14px;
padding:14px 16px 16px}
table.heat{border-collapse:separate;border-spacing:3px;font-size:13px;width:100%}
table.heat caption{text-align:left;font-weight:600;font-size:15px;padding:0 0 8px 3px;overflow-wrap:anywhere}
table.heat th{font-weight:500;color:var(--soft);padding:2px 6px}
table.heat tbody th{text-align:left;white-space:nowrap;max-width:160px;overflow:hidden;text-overflow:ellipsis;width:1%}
table.heat th.dead{color:var(--bad)}
table.heat td{background:rgb(var(--heat)/var(--v));border-radius:4px;text-align:center;padding:3px 4px;min-width:34px}
table.heat td.strong{color:var(--onheat);font-weight:600}
table.heat tr.all>*{border-top:0}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:18px}
.shot{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:14px;margin:0;min-width:0}
.shot .three{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:8px}
.shot img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;background:var(--tint);
image-rendering:pixelated}
.shot .three span{display:block;font-size:12px;color:var(--soft);margin-bottom:3px}
.shot p{margin:10px 0 0;font-size:14px;line-height:1.45;overflow-wrap:anywhere}
.shot .was{color:var(--good);font-weight:600}.shot .now{color:var(--bad);font-weight:600}
.made{display:grid;grid-template-columns:minmax(110px,190px) minmax(0,1fr);gap:0;margin:0;font-size:14px}
.made dt,.made dd{padding:7px 0;border-bottom:1px solid var(--rule);margin:0}
.made dt{color:var(--soft);padding-right:14px}.made dd{overflow-wrap:anywhere}
.made dt:last-of-type,.made dd:last-of-type{border-bottom:0}
pre{background:var(--tint);border-radius:10px;padding:12px 16px;white-space:pre-wrap;margin:0 0 12px;line-height:1.5}
.dial{border:0;margin:20px 0 0;padding:0;min-width:0}
.dial legend{padding:0;font-size:13px;color:var(--soft);font-weight:600}
.stops{display:flex;flex-wrap:wrap;position:relative}
.stops>input{position:absolute;top:20px;left:0;width:1px;height:1px;margin:0;opacity:0}
.stops>label{flex:1 0 36px;position:relative;padding:34px 2px 4px;min-height:58px;text-align:center;font-size:14px;
color:var(--soft);cursor:pointer;font-variant-numeric:tabular-nums}
.stops>label::before{content:"";position:absolute;top:15px;left:0;right:0;height:6px;background:var(--rule)}
.stops>label:first-of-type::before{left:50%}.stops>label:last-of-type::before{right:50%}
.stops>label::after{content:"";position:absolute;top:18px;left:50%;width:12px;height:12px;border-radius:50%;
border:2px solid var(--soft);background:var(--card);transform:translate(-50%,-50%)}
.stops>label.chosen{font-weight:700;color:var(--ink)}.stops>label.chosen::after{border-color:var(--ink);border-width:3px}
.stops>label:has(~input:checked)::before{background:var(--soft)}
.stops>input:not(:first-of-type):checked+label::before{
background:linear-gradient(90deg,var(--soft) 50%,var(--rule) 50%)}
.stops>input:checked+label:last-of-type::before{background:var(--soft)}
.stops>label:hover,.stops>input:checked+label{color:var(--ink)}.stops>input:checked+label{font-weight:700}
.stops>input:checked+label::after{width:24px;height:24px;border:7px solid var(--ink);z-index:1}
.stops>input:focus-visible+label{outline:3px solid var(--c1);outline-offset:-2px;border-radius:8px}
.panel{display:none;order:1;flex:0 0 100%;min-width:0;padding-top:4px}
.stops>input:checked+label+.panel{display:block}
.panel h3{font-size:19px;margin:12px 0 0;display:flex;flex-wrap:wrap;gap:4px 10px;align-items:center}
.card>.story:last-child{margin-bottom:0}
.panel .bar{margin:14px 0 20px}.panel h4{font-size:13px;color:var(--soft);font-weight:600;margin:8px 0 10px}
.more{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px 40px;margin:22px 0 16px;
align-items:start}.more .scroll{margin:0}
footer{color:var(--soft);font-size:13px;padding:44px 28px 40px}
"""

_COLOURS = "".join(
    f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}.b{n}{{background:var(--c{n})}}" for n in range(1, 9)
)

_NARROW = """
@media (max-width:640px){svg.large .tick,svg.large .label{font-size:17px}
svg.plot .tick,svg.plot .label{font-size:14px}
main,header.top,footer{padding-left:16px;padding-right:16px}header.top{padding-top:26px}
h1{font-size:26px}section{margin-top:40px}.card{padding:20px 18px}.story{font-size:16px}.figures dd.big{font-size:38px}
table.stack thead{display:none}table.stack tr{display:block;padding:12px 16px;border-bottom:1px solid var(--rule)}
table.stack tbody tr:last-child{border-bottom:0}
table.stack tbody th,table.stack tbody td{display:flex;justify-content:space-between;gap:16px;border:0;padding:3px 0;
text-align:right}
table.stack tbody th{display:block;text-align:left;padding-bottom:6px}
table.stack td::before{content:attr(data-label);color:var(--soft);font-weight:400;text-align:left}
table.stack tr.worst{background:var(--tint)}table.stack td small{display:inline;margin-left:6px}
table.stack td.left{display:block;text-align:left}table.stack td.left::before{display:none}
table.stack td.left small{display:block;margin:2px 0 0}
table.data td.none{display:none}table.data.attacks tbody th,table.data tbody th{min-width:0}
.stops>label{flex-basis:33px;padding-left:0;padding-right:0;font-size:13px}
.made{grid-template-columns:1fr}.made dt{border:0;padding-bottom:0}.made dd{padding-top:0}}
@media print{:root{--paper:#fff}body{font-size:12px}section,header.top{margin-top:20px}nav{display:none}
.card,figure,.shot,.heatbox,tr{break-inside:avoid}.heatbox{max-height:none;overflow:visible}.scroll{overflow:visible}
.stops>input,.stops>label,.dial legend{display:none}.stops>.panel{display:block!important;break-inside:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def css() -> str:
    """Returns the whole style sheet."""
    return CSS + _COLOURS + _NARROW
