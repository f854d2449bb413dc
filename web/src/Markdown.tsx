import { memo, useState, type ReactNode } from "react"
import ReactMarkdown, { type Components } from "react-markdown"
import remarkGfm from "remark-gfm"
import { text } from "./text"

/** A button that copies; it says whether that worked. */
export function Copy({ what, label = text.copy }: { what: () => string, label?: string }) {
  const [said, setSaid] = useState("")
  const copy = async () => {
    const worked = await navigator.clipboard?.writeText(what()).then(() => true, () => false)
    setSaid(worked ? text.copied : text.copyFailed)
    setTimeout(() => setSaid(""), worked ? 1500 : 6000)
  }
  return <button onClick={copy}><span role="status">{said || label}</span></button>
}

function plain(node: ReactNode): string {
  if (typeof node === "string") return node
  if (Array.isArray(node)) return node.map(plain).join("")
  const children = (node as { props?: { children?: ReactNode } } | null)?.props?.children
  return children === undefined ? "" : plain(children)
}

const components: Components = {
  // An answer loads nothing from anywhere: pictures are named, not fetched.
  img: ({ alt }) => <span className="image">[{text.image(alt ?? "")}]</span>,
  a: ({ href, children }) => <a href={href} target="_blank" rel="noopener noreferrer nofollow">{children}</a>,
  pre: ({ children }) => (
    <div className="code">
      <pre tabIndex={0}>{children}</pre>
      <Copy what={() => plain(children)} label={text.copyCode} />
    </div>),
  table: ({ children }) => <div className="scroll" tabIndex={0}><table>{children}</table></div>,
  ...Object.fromEntries([1, 2, 3, 4, 5, 6].map(n => [`h${n}`, // below the page's own headings
    ({ children }: { children?: ReactNode }) => <p className={`h h${n}`}><strong>{children}</strong></p>])),
}

/** Markdown without raw HTML: what looks like a tag is shown as it was written. */
export const Markdown = memo(function Markdown({ content }: { content: string }) {
  return <ReactMarkdown remarkPlugins={[remarkGfm]} components={components}>{content}</ReactMarkdown>
})
