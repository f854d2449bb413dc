// An answer as its tokens: choose one to see what else could have been said, and how it came about.
import { useId, useState, type KeyboardEvent } from "react"
import { messagesUpTo } from "./conversations"
import { text } from "./text"
import { asPageError, type Node, type Token } from "./types"
import type { Chat } from "./useChat"
import type { Inside } from "./worker"

/** A token so that one can see it: line breaks and a lone space have no shape of their own. */
function visible(token: string): string {
  const shown = token.replace(/\n/g, "↵")
  return shown === " " ? text.space : shown
}

const percent = (logprob: number) => {
  const p = 100 * Math.exp(logprob)
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %"
}

export function Tokens({ chat, node }: { chat: Chat, node: Node }) {
  const tokens = node.tokens!
  const [at, setAt] = useState(0)
  const move = (event: KeyboardEvent<HTMLElement>) => {
    const steps: Record<string, number> = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }
    const to = steps[event.key]
    if (to === undefined || !tokens[to]) return
    event.preventDefault()
    setAt(to)
    event.currentTarget.querySelectorAll("button")[to].focus()
  }
  return (
    <div className="tokens">
      <p className="help">{text.tokensHelp}</p>
      <div className="said" role="group" aria-label={text.tokens} onKeyDown={move}>
        {tokens.map((token, i) => (
          <button key={i} tabIndex={i === at ? 0 : -1} aria-pressed={i === at} onClick={() => setAt(i)}
            style={{ "--p": Math.exp(token.logprob) } as React.CSSProperties}
            aria-label={text.tokenLabel(visible(token.text), percent(token.logprob))}>
            {token.text.replace(/\n/g, "↵\n")}</button>))}
      </div>
      <Rivals token={tokens[at]} />
      {chat.engine.current?.look && tokens.every(token => token.id !== undefined)
        && <LookInside key={at} chat={chat} node={node} at={at} />}
    </div>
  )
}

function Rivals({ token }: { token: Token }) {
  const rows = token.top.map(([name, logprob]) => ({ name, logprob, said: name === token.text }))
  if (!rows.some(row => row.said)) rows.push({ name: token.text, logprob: token.logprob, said: true })
  return (
    <table aria-live="polite">
      <caption>{text.couldHaveSaid(`“${visible(token.text)}”`)}</caption>
      <thead><tr><th scope="col">{text.token}</th><th scope="col">{text.chance}</th></tr></thead>
      <tbody>
        {rows.map(({ name, logprob, said }, i) => (
          <tr key={i} className={said ? "chosen" : ""}>
            <th scope="row">“{visible(name)}”{said && ` (${text.chosen})`}</th>
            <td><span className="bar" style={{ width: `${6 * Math.exp(logprob)}em` }} /> {percent(logprob)}</td>
          </tr>))}
      </tbody>
    </table>
  )
}

function LookInside({ chat, node, at }: { chat: Chat, node: Node, at: number }) {
  const [inside, setInside] = useState<Inside | "busy" | null>(null)
  const look = async () => {
    setInside("busy")
    try {
      const said = node.tokens!.slice(0, at).map(token => token.id!)
      setInside(await chat.engine.current!.look!(messagesUpTo(chat.talk, node.parent), chat.settings, said))
    } catch (error) {
      setInside(null)
      chat.setProblem({ error: asPageError(error) })
    }
  }
  if (inside === null) return <button disabled={!!chat.running} onClick={look}>{text.lookInside}</button>
  if (inside === "busy") return <p role="status">{text.looking}…</p>
  return <InsideView inside={inside} />
}

function InsideView({ inside: { tokens, attention, lens } }: { inside: Inside }) {
  const [block, setBlock] = useState(attention.length - 1)
  const [head, setHead] = useState(0)
  const weights = attention[block][head]
  const id = useId()
  const select = (label: string, value: number, n: number, set: (n: number) => void) => <>
    <label htmlFor={id + label}>{label}</label>
    <select id={id + label} value={value} onChange={event => set(Number(event.target.value))}>
      {Array.from({ length: n }, (_, i) => <option key={i} value={i}>{i + 1}</option>)}
    </select>
  </>
  return (
    <div className="inside">
      <table>
        <caption>{text.lens}</caption>
        <thead><tr><th scope="col">{text.block}</th><th scope="col">{text.guess}</th><th scope="col">{text.chance}</th>
        </tr></thead>
        <tbody>
          {lens.map(([token, p], i) => (
            <tr key={i}><th scope="row">{i + 1}</th><td>“{visible(token)}”</td><td>{percent(Math.log(p))}</td></tr>))}
        </tbody>
      </table>
      <p className="help">{text.lensHelp}</p>
      <h4>{text.attention}</h4>
      <div className="row">
        {select(text.block, block, attention.length, setBlock)}
        {select(text.head, head, attention[block].length, setHead)}
      </div>
      <p className="looked" aria-label={text.attention}>
        {tokens.map((token, i) => <span key={i} style={{ "--p": Math.sqrt(weights[i]) } as React.CSSProperties}
          title={percent(Math.log(weights[i]))}>{token.replace(/\n/g, "↵\n")}</span>)}
      </p>
      <p className="help">{text.attentionHelp}</p>
    </div>
  )
}
